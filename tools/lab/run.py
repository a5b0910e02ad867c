"""``kvmhost lab run HOST -- COMMAND...``: run a command in an emulated host."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kvmhost.errors import LayoutError
from kvmhost.files import new_directory
from kvmhost.lab.hosts import find_host
from kvmhost.lab.inside import inside_job
from kvmhost.lab.running import JobEnded, JobOutput, RunningHost
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option

__all__ = ["add_host_arguments", "main", "parser", "split_command"]


def main(argv: Sequence[str]) -> int:
    """Run the command; return its status."""
    own, command = split_command(list(argv))
    args = parser().parse_args(own)
    host = find_host(args.host)
    if not command:
        raise LayoutError("no command: write it after --, as in kvmhost lab run HOST -- uname -r")
    job = inside_job(host, command)
    if args.keep is None:
        return _run(RunningHost(host, job, mem_bytes=args.mem), args.timeout)
    with new_directory(args.keep):
        pass
    return _run(RunningHost(host, job, mem_bytes=args.mem, keep=args.keep), args.timeout)


def _run(running: RunningHost, timeout_s: float) -> int:
    with running:
        for event in running.events(timeout_s):
            if isinstance(event, JobOutput):
                stream = sys.stderr if event.error else sys.stdout
                stream.flush()
                stream.buffer.write(event.data)
                stream.buffer.flush()
            elif isinstance(event, JobEnded):
                return event.status
    raise AssertionError("events end with the command's end")


def split_command(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return what is before ``--`` and what is after it."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def add_host_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that boots a host."""
    parser.add_argument("host", metavar="HOST", help="kvmhost lab list shows all")
    add_option(parser, "--mem", default="3G", help="memory of the host")


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost lab run",
        usage="kvmhost lab run [options] HOST -- COMMAND...",
        description="Boot an emulated host, run a command in it as root, and power it off. This "
        "machine's files are there, read-only under an overlay; what the command writes is lost "
        "at the end. Its output and exit status are passed on; its input is empty.",
        epilog="Exit codes: the command's own; 124 timed out, 125 the host failed, 126 QEMU or "
        "the host's kernel is missing.",
    )
    add_host_arguments(parser)
    add_option(parser, "--timeout", default="1h", help="end the host after this time")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="create this directory and leave the host's memory (ram) and console text in it",
    )
    return parser
