"""``kvmhost drain VM``: fault in all evicted pages and stop evicting.

Use it before a daemon ends, or before the store of a VM is removed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvmhost.control.client import Client
from kvmhost.errors import LayoutError
from kvmhost.tools.args import seconds
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.parser import CommandParser

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
        description="Bring every evicted page of a running VM back, and lift its resident limit.",
    )
    parser.add_argument("vm", help="the VM's name, or the path of its control socket")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=600.0,
        metavar="SECONDS",
        help="give up after this time; the VM goes on draining (default: 600)",
    )
    parser.add_argument(
        "--force", action="store_true", help="also while a daemon manages the VM and evicts again"
    )
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    return parser
