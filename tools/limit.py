"""``kvmhost limit VM SIZE``: limit the resident memory of a VM and evict to the limit now."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvmhost.control.client import Client
from kvmhost.tools.args import limit_bytes
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option, add_vm

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
    add_vm(parser)
    parser.add_argument(
        "size", type=limit_bytes, metavar="SIZE", help="the limit, for example 64M; 0 removes it"
    )
    add_option(
        parser,
        "--timeout",
        default="10m",
        help="give up after this time; the VM continues to evict",
    )
    add_option(parser, "--json")
    return parser
