"""``kvmhost young watch``: a live view of a VM's memory in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.installing import install_hint
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option
from kvmhost.tools.young.common import add_source_arguments, open_source

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

    with open_source(args.vm, args.pid, args.mapping) as client:
        sampler = WatchSampler(
            client,
            args.tracker,
            view=args.view,
            interval_s=args.interval,
            force=args.force,
        )
        app = WatchApp(sampler, args.interval)
        app.run()
    return app.return_code or 0


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young watch",
        description="Show which pages of a VM or process are young, as it runs: a map of its "
        "memory, with evictions and refaults and who decided them, the working set, generations, "
        "pressure. Of a mostly idle memory the used parts are shown. ? shows the keys. It takes at "
        "most 4 % of a core: where a tick costs more, it ticks less often.",
    )
    add_source_arguments(parser)
    add_option(parser, "--interval", help="time between ticks, at least")
    add_option(
        parser, "--tracker", help="auto (the one in use, or the best), or one that doctor lists"
    )
    add_option(parser, "--view", default="watch")
    add_option(parser, "--force")
    return parser
