"""``kvmhost resume VM``: undo a pause of a VM."""

from __future__ import annotations

from collections.abc import Sequence

from kvmhost.control.client import Client
from kvmhost.printable import printable
from kvmhost.tools.args import count
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vmtable import run_output

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
    parser.add_argument("vm", metavar="VM", help="the VM's name, or the path of its control socket")
    parser.add_argument(
        "--pause",
        type=count,
        metavar="N",
        help="the pause to undo, as kvmhost pause printed it (default: the last one)",
    )
    parser.add_argument("--json", action="store_true", help="print the state as JSON")
    return parser
