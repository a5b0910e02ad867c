"""``kvmhost young watch``: a live view of a VM's memory in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvmhost.control.client import Client
from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.installing import install_hint
from kvmhost.tools.args import seconds
from kvmhost.tools.parser import CommandParser

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise LayoutError(
            "young watch needs a terminal; for pipes there are young record and young snapshot"
        )
    try:
        from kvmhost.reclaim.watch.app import WatchApp
    except ImportError as error:
        raise CapabilityError("watch", "textual", str(error), install_hint("watch")) from error
    from kvmhost.reclaim.watch.data import WatchSampler

    clear = True if args.clear else False if args.peek else None
    with Client(args.vm) as client:
        app = WatchApp(WatchSampler(client, args.tracker, clear), args.interval)
        app.run()
    return app.return_code or 0


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young watch",
        description="Show which pages of a VM are young, as it runs: a map of its memory, the "
        "working set, generations, pressure, evictions and faults. ? shows the keys. It takes at "
        "most 5 % of a core: where a tick costs more, it ticks less often.",
    )
    parser.add_argument("vm", metavar="VM", help="name of a VM, or path of its socket")
    parser.add_argument(
        "--interval",
        type=seconds,
        default=1.0,
        metavar="SECONDS",
        help="between ticks, at least (default: 1)",
    )
    parser.add_argument(
        "--tracker",
        default="auto",
        metavar="NAME",
        help="auto (the one in use, or the best), or one that doctor lists",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--clear",
        action="store_true",
        help="begin a new window at each tick, also where a daemon looks after the VM, which "
        "then sees less (default: where none does)",
    )
    how.add_argument(
        "--peek",
        action="store_true",
        help="leave the accessed bits as they are: shows what was touched since somebody "
        "else harvested (default: where a daemon looks after the VM)",
    )
    return parser
