"""The ``kvmhost`` command: selects the subcommand; ``ending`` documents the exit codes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from kvmhost import __version__
from kvmhost.printable import printable
from kvmhost.suggest import unknown_name
from kvmhost.timescale import check_time_scale
from kvmhost.tools.commands import COMMANDS
from kvmhost.tools.ending import EXIT_USAGE, guard
from kvmhost.tools.stuck import DEADLINE_S

__all__ = ["main", "reclaimd", "run_command"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``kvmhost`` command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) > 1 and arguments[0] == "help":
        arguments = [*arguments[1:], "--help"]
    if arguments and arguments[0] in COMMANDS:
        return run_command(arguments[0], arguments[1:])
    return guard("kvmhost", lambda: _general(arguments))


def _general(arguments: Sequence[str]) -> int:
    """Handle options without a subcommand, and unknown subcommands."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else EXIT_USAGE
    if arguments[0] in ("-V", "--version"):
        print(f"kvmhost {__version__}")
        return 0
    what = "option" if arguments[0].startswith("-") else "command"
    known = ("--help", "--version") if what == "option" else ("help", *COMMANDS)
    problem = unknown_name(what, arguments[0], known)
    print(f"kvmhost: {printable(problem)}; see kvmhost --help", file=sys.stderr)
    return EXIT_USAGE


def reclaimd() -> int:
    """Run ``kvmhost reclaimd``: the entry point of the ``reclaimd`` command."""
    return run_command("reclaimd", sys.argv[1:])


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Run one subcommand; every :class:`KvmHostError` becomes an exit code."""
    # A VM must stop when requested, even if its output is not read.
    deadline_s = DEADLINE_S if name == "run" else None
    as_json = "--json" in arguments
    return guard(
        _prog(name, arguments), lambda: _command(name)(arguments), deadline_s, as_json=as_json
    )


#: Commands that do nothing without the name of a subcommand.
_GROUPS = ("bench", "lab", "young")


def _prog(name: str, arguments: Sequence[str]) -> str:
    """Return the words of a command, with which its messages begin."""
    below = arguments[0] if arguments else ""
    has_name = name in _GROUPS and below.replace("_", "").isalnum()
    if has_name or (name, below) == ("guests", "build"):
        return f"kvmhost {name} {below}"
    return f"kvmhost {name}"


def _command(name: str) -> Callable[[Sequence[str]], int]:
    check_time_scale()
    command: Callable[[Sequence[str]], int]
    command = importlib.import_module(f"kvmhost.tools.{COMMANDS[name][0]}").main
    return command


def _usage() -> str:
    lines = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    codes = (
        "exit codes: 0 done, 1 failed, 2 wrong usage or input, 124 timed out,\n"
        "  125 failed on our side, 126 a capability is missing, 129, 130 and 143 ended by\n"
        "  SIGHUP, SIGINT and SIGTERM; run passes the guest's own status through"
    )
    return (
        "usage: kvmhost COMMAND [options]    (kvmhost help COMMAND tells more)\n\n"
        f"commands:\n{lines}\n\n{codes}"
    )


if __name__ == "__main__":
    sys.exit(main())
