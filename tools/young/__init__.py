"""``kvmhost young NAME``: record and analyse when each guest page was touched."""

from __future__ import annotations

from collections.abc import Sequence

from kvmhost.tools.dispatch import dispatch
from kvmhost.tools.parser import CommandParser

__all__ = ["SUBCOMMANDS", "main", "parser"]

#: One-line description by name, which is also the name of the module in this package.
SUBCOMMANDS = {
    "snapshot": "one bitmap of a running VM: counts, densities, ranges",
    "heatmap": "a picture, gfn by time",
    "watch": "a live view in the terminal",
    "record": "bitmaps of running VMs into a file, window by window",
    "stat": "what is in a record: windows, sources, main figures, phases",
    "wss": "working-set size over time, at several lengths",
    "ages": "how cold pages are, and what it would cost to take them",
    "hot": "ranges of pages that are young most of the time",
    "diff": "how alike two stretches or two records are",
    "compare": "trackers and table formats on the same windows: where and why they differ",
    "page": "the history of one page",
    "gfn": "an address as gfn, gpa, hva and slot offset",
    "whatif": "records replayed through policies: predicted refaults and savings",
    "export": "a record as DAMON's, KVM dirty bitmaps, text, or a list of gfns",
    "import": "a record out of those",
}


_ABOUT = "Look at which pages were touched."


def main(argv: Sequence[str]) -> int:
    """Run one of the subcommands."""
    return dispatch("kvmhost young", _ABOUT, __name__, SUBCOMMANDS, argv)


def parser() -> CommandParser:
    """Return a parser without the subcommands; :mod:`kvmhost.tools.tree` adds them."""
    return CommandParser(prog="kvmhost young", description=_ABOUT)
