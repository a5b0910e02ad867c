"""``kvmhost bench NAME``: benchmarks, each of which compares two variants in one run."""

from __future__ import annotations

from collections.abc import Sequence

from kvmhost.tools.dispatch import dispatch
from kvmhost.tools.parser import CommandParser

__all__ = ["SUBCOMMANDS", "main", "parser"]

#: One-line description by name, which is also the name of the module in this package.
SUBCOMMANDS = {
    "walk": "harvest over live entries against a plain sum and a bare atomic loop",
    "exits": "port exits in the C loop and in Python against a minimal C loop",
    "harvest": "trackers on a 1 GiB guest: scan, re-arm, and what the guest pays",
    "sampling": "re-arming only a fraction of the pages: what the guest keeps, how stale it gets",
    "snapshot": "saving a VM that evicts beside cp of the same bytes",
    "start": "kvmhost run hello: wall time of the whole process",
    "trackers": "pagemap and dirty against the bare kernel calls; memory of each tracker",
    "pager": "codecs, fault-in and eviction beside a minimal C pager, memory taken",
    "mmu": "tables in all formats: speed, locking, batching",
    "young": "records of young bitmaps: append, open, working set, heatmap",
    "views": "a daemon beside a record, a live view and a heatmap; the cost of a view",
    "reclaim": "policies against Belady: refaults, throughput, cost, the rows of 2023",
}


_ABOUT = "Measurements, each a ratio of two variants in one run."


def main(argv: Sequence[str]) -> int:
    """Run one benchmark."""
    return dispatch("kvmhost bench", _ABOUT, __name__, SUBCOMMANDS, argv)


def parser() -> CommandParser:
    """Return a parser without the subcommands; :mod:`kvmhost.tools.tree` adds them."""
    return CommandParser(prog="kvmhost bench", description=_ABOUT)
