"""The ``kvmhost`` command: picks the subcommand and turns errors into exit codes.

====  =====================================================================
code  meaning
====  =====================================================================
0     done (``run``: the guest's own status)
1     failed
2     wrong usage or bad input
124   timed out
125   failed on our side: internal error, triple fault, unexpected exit
126   a capability is missing; the message says which, and what to do
130   interrupted
====  =====================================================================
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from kvmhost import __version__
from kvmhost.errors import (
    CapabilityError,
    ControlError,
    GuestTimeout,
    ImageError,
    KvmHostError,
    LayoutError,
    NameInUseError,
    VmGoneError,
)
from kvmhost.reclaim.errors import ConfigError, KernelFileError, ReclaimError

__all__ = ["COMMANDS", "main", "reclaimd", "run_command"]

EXIT_FAILED, EXIT_USAGE = 1, 2
EXIT_TIMEOUT, EXIT_OURS, EXIT_MISSING, EXIT_INTERRUPTED = 124, 125, 126, 130

#: Subcommand: its module in this package, and one line about it.
COMMANDS = {
    "doctor": ("doctor", "what works on this host and what does not, with the remedy"),
    "guests": ("guests_cmd", "list the built-in guests and their parameters"),
    "run": ("run", "boot a guest and pass its exit status through"),
    "snapshot": ("snapshot", "write a running VM into a file, for run --restore"),
    "young": ("young", "look at young bitmaps of a running VM"),
    "reclaimd": ("reclaimd", "keep VMs under a memory budget by evicting cold pages"),
    "drain": ("drain", "bring every evicted page of a VM back, and lift its limit"),
    "page": ("page", "all that is known of one page, and why it was taken or not"),
    "lru_gen": ("lru_gen", "show generations, age and evict, as the kernel's file does"),
    "demo": ("demo", "the whole path: boot, harvest, reclaim under a limit, look"),
    "accuracy": ("accuracy", "how accurate and how expensive each tracker is"),
    "bench": ("bench", "measure walks, exits, harvests and starts, as ratios in one run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``kvmhost`` command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else EXIT_USAGE
    if arguments[0] in ("-V", "--version"):
        print(f"kvmhost {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"kvmhost: no command {arguments[0]!r}\n\n{_usage()}", file=sys.stderr)
        return EXIT_USAGE
    return run_command(arguments[0], arguments[1:])


def reclaimd() -> int:
    """Run ``kvmhost reclaimd``: the entry point of the ``reclaimd`` command."""
    return run_command("reclaimd", sys.argv[1:])


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Run one subcommand; every error that is one of ours becomes an exit code."""
    try:
        module = importlib.import_module(f"kvmhost.tools.{COMMANDS[name][0]}")
        command: Callable[[Sequence[str]], int] = module.main
        status = command(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone. Keep the interpreter from failing once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (KvmHostError, ReclaimError) as error:
        print(f"kvmhost {name}: {error}", file=sys.stderr)
        return exit_code(error)


def exit_code(error: KvmHostError | ReclaimError) -> int:
    """Return the documented exit code of an error."""
    if isinstance(error, KernelFileError):
        return EXIT_MISSING
    if isinstance(error, ConfigError | ImageError | LayoutError | NameInUseError):
        return EXIT_USAGE
    if isinstance(error, CapabilityError):
        return EXIT_MISSING
    if isinstance(error, GuestTimeout):
        return EXIT_TIMEOUT
    if isinstance(error, VmGoneError):
        return EXIT_FAILED
    if isinstance(error, ControlError):
        return EXIT_USAGE if error.status == 400 else EXIT_FAILED
    return EXIT_OURS


def _usage() -> str:
    lines = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    codes = (
        "exit codes: 0 done, 1 failed, 2 wrong usage or input, 124 timed out,\n"
        "  125 failed on our side, 126 a capability is missing, 130 interrupted;\n"
        "  run passes the guest's own status through"
    )
    return (
        "usage: kvmhost COMMAND [options]    (kvmhost COMMAND --help tells more)\n\n"
        f"commands:\n{lines}\n\n{codes}"
    )


if __name__ == "__main__":
    sys.exit(main())
