"""``kvmhost resume VM``: undo a pause of a VM."""

from __future__ import annotations

from collections.abc import Sequence

from kvmhost.control.client import Client
from kvmhost.printable import printable
from kvmhost.tools.args import count
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vmtable import run_output
from kvmhost.tools.vocabulary import add_option, add_vm

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    with Client(args.vm) as client:
        state = client.resume(args.pause)
    if args.json:
        emit(run_output(args.vm, state))
    elif state.paused:
        print(f"{printable(args.vm)}: still paused, by another pause")
    else:
        print(f"{printable(args.vm)}: {'running' if state.running else 'ended'}")
    return 0


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost resume",
        description="Undo a pause of a VM, by default the last one. It also starts a VM that "
        "waits since kvmhost run --paused.",
    )
    add_vm(parser)
    parser.add_argument(
        "--pause",
        type=count,
        metavar="N",
        help="the pause to undo, as kvmhost pause printed it (default: the last one)",
    )
    add_option(parser, "--json")
    return parser
