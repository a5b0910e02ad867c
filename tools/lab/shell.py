"""``kvmhost lab shell HOST``: an interactive shell in an emulated host."""

from __future__ import annotations

import contextlib
import os
import sys
import termios
import tty
from collections.abc import Iterator, Sequence

from kvmhost.errors import LayoutError
from kvmhost.lab.hosts import RootKind, find_host
from kvmhost.lab.inside import inside_job
from kvmhost.lab.running import JobEnded, RunningHost
from kvmhost.tools.lab.run import add_host_arguments
from kvmhost.tools.parser import CommandParser

__all__ = ["main", "parser"]

_FOREVER_S = 1e9


def main(argv: Sequence[str]) -> int:
    """Run the shell; return its status."""
    args = parser().parse_args(argv)
    host = find_host(args.host)
    if not sys.stdin.isatty():
        raise LayoutError("standard input is no terminal; use kvmhost lab run HOST -- COMMAND")
    shell = "/bin/bash" if host.root is RootKind.MACHINE else "/bin/sh"
    job = inside_job(host, [shell, "-i"], interactive=True)
    print("boots; leave the shell with exit or Ctrl-D", file=sys.stderr)
    with _raw_terminal(), RunningHost(host, job, mem_bytes=args.mem) as running:
        for event in running.events(_FOREVER_S):
            if isinstance(event, JobEnded):
                return event.status
    raise AssertionError("events end with the shell's end")


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Let every key reach the host; restore the terminal at the end of the context."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    size = os.get_terminal_size(fd)
    os.environ["COLUMNS"], os.environ["LINES"] = str(size.columns), str(size.lines)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost lab shell",
        description="Boot an emulated host and start a shell in it, on this terminal. The host "
        "powers off when the shell ends.",
    )
    add_host_arguments(parser)
    return parser
