"""``kvmhost pause VM``: hold the vCPUs of a running VM."""

from __future__ import annotations

from collections.abc import Sequence

from kvmhost.control.client import Client
from kvmhost.printable import printable
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vmtable import run_output
from kvmhost.tools.vocabulary import add_option, add_vm

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    with Client(args.vm) as client:
        state = client.pause(args.duration or 0.0)
    if args.json:
        emit(run_output(args.vm, state))
    else:
        until = f" for {args.duration:g} s" if args.duration else ""
        print(f"{printable(args.vm)}: paused{until} (pause {state.pause})")
    return 0


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost pause",
        description="Hold the vCPUs of a running VM. Its memory stays as it is, and snapshots, "
        "harvests and evictions go on working.",
        epilog="Pauses add up: the VM runs on when each of them was undone.",
    )
    add_vm(parser)
    add_option(
        parser,
        "--duration",
        default=None,
        help="resume the VM after this time (default: it stays paused)",
    )
    add_option(parser, "--json")
    return parser
