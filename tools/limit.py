"""``kvmhost limit VM SIZE``: limit the resident memory of a VM and evict to the limit now."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvmhost.control.client import Client
from kvmhost.tools.args import seconds, size_bytes
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.parser import CommandParser

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command; return 0 if the limit holds, 1 if too few pages could be evicted."""
    args = parser().parse_args(argv)
    with Client(args.vm, timeout_s=args.timeout) as client:
        state = client.shrink(args.size)
    if args.json:
        emit(state)
    else:
        print(f"{state.evicted_pages} pages evicted, limit {state.resident_max_bytes} bytes")
    if state.over_pages:
        print(
            f"kvmhost limit: {state.over_pages} pages are resident above the limit: {_OVER}",
            file=sys.stderr,
        )
    return 1 if state.over_pages else 0


_OVER = "nothing else can be evicted now; see the outcomes in kvmhost run --json"


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost limit",
        description="Limit the resident memory of a running VM: evict what is above the limit "
        "now, and hold it from then on.",
        epilog="Exit code 1 if pages above the limit cannot be evicted.",
    )
    parser.add_argument("vm", help="the VM's name, or the path of its control socket")
    parser.add_argument(
        "size", type=size_bytes, metavar="SIZE", help="for example 64M; 0 lifts the limit"
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=600.0,
        metavar="SECONDS",
        help="give up after this time; the VM goes on evicting (default: 600)",
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    return parser
