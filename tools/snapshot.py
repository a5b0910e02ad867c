"""``kvmhost snapshot``: save a running VM into a file.

``kvmhost run --restore FILE`` resumes the saved VM. The running VM continues too, unless
``--stop`` is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvmhost.control.client import Client
from kvmhost.printable import printable
from kvmhost.tools.args import about
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.vms import SnapshotOutput
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option, add_vm

__all__ = ["main", "parser"]


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(prog="kvmhost snapshot", description=about(__doc__))
    add_vm(parser)
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="the snapshot, written completely or not at all",
    )
    parser.add_argument("--stop", action="store_true", help="end the VM once the file is written")
    add_option(parser, "--json")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    with Client(args.vm) as client:
        n_bytes = client.snapshot(str(args.file.absolute()), args.stop)
    if args.json:
        emit(SnapshotOutput(file=str(args.file), memory_bytes=n_bytes, stopped=args.stop))
        return 0
    print(f"{printable(args.file)}: {n_bytes / (1 << 20):.1f} MiB of memory")
    return 0
