"""``kvmhost drain VM``: fault in all evicted pages and stop evicting.

Use it before a daemon ends, or before the store of a VM is removed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvmhost.control.client import Client
from kvmhost.errors import LayoutError
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option, add_vm

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command; return 0 if all pages are resident, 1 if one is not."""
    args = parser().parse_args(argv)
    with Client(args.vm, timeout_s=args.timeout) as client:
        lease = client.state().lease
        if lease is not None and not args.force:
            raise LayoutError(
                f"{args.vm} is managed by {lease.holder} (process {lease.pid}), which would evict "
                "again: stop it, or drain all the same with --force"
            )
        report = client.drain(force=args.force)
        lease = client.state().lease
    if lease is not None:
        print(
            f"kvmhost drain: {lease.holder} (process {lease.pid}) may evict again", file=sys.stderr
        )
    if args.json:
        emit(report)
    else:
        print(f"{report.restored_pages} pages came back")
    if report.lost_pages:
        print(f"kvmhost drain: {report.lost_pages} pages are lost: {_LOST}", file=sys.stderr)
    if report.left_pages:
        print(f"kvmhost drain: {report.left_pages} pages are still out: {_LEFT}", file=sys.stderr)
    return 1 if report.lost_pages or report.left_pages else 0


_LOST = "the store could not give them back; a touch of one stops the VM"
_LEFT = "the host had no memory for them; try again"


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost drain",
        description="Bring every evicted page of a running VM back, and remove its resident limit.",
    )
    add_vm(parser)
    add_option(
        parser,
        "--timeout",
        default="10m",
        help="give up after this time; the VM continues to drain",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="drain even if a daemon manages the VM, which may evict pages again",
    )
    add_option(parser, "--json")
    return parser
