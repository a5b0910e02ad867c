"""A policy that evicts pages in the order in which they came in.

Try it on a trace, without a VM: three windows of accesses, memory for four pages.

    $ python kvmhost_fifo.py
    3 evictions, 1 refault
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvmhost.bitmap import Words
from kvmhost.reclaim.policy.base import Everything, Gfns, HarvestPlan, Mask, Probe


class Fifo:
    """First in, first out."""

    name = "fifo"

    def __init__(self, n_pages: int) -> None:
        self.n_pages, self._next = n_pages, 1
        self._came = np.zeros(n_pages, dtype=np.int64)

    def plan(self, tables_young: Words | None = None) -> HarvestPlan:
        """Harvest all pages."""
        return Everything

    def refaulted(self, gfns: Gfns, now_ns: int) -> None:
        """Number the pages in the order in which they came in."""
        self._came[gfns] = np.arange(self._next, self._next + gfns.size)
        self._next += gfns.size

    def age(self, young: Words, now_ns: int) -> None:
        """Ignore accesses: only the order of coming in counts."""

    def victims(self, n: int, candidates: Mask, now_ns: int, probe: Probe | None = None) -> Gfns:
        """Return the candidates that came in first."""
        pages = np.flatnonzero(candidates)
        return pages[np.argsort(self._came[pages], kind="stable")[: max(n, 0)]]

    def evicted(self, gfns: Gfns, now_ns: int) -> None:
        """Forget nothing: a page that comes back gets a new number."""

    def sizes(self, pages: Mask) -> list[tuple[int, int]]:
        """Return all pages as one generation."""
        return [(0, int(pages.sum()))]

    def counters(self) -> Mapping[str, float]:
        """Return how many pages came in."""
        return {"came_in": self._next - 1}

    def explain(self, gfn: int) -> Mapping[str, int | float | str]:
        """Return a page's number."""
        return {"came": int(self._came[gfn])}


def main() -> None:
    """Replay three windows with room for four pages."""
    from kvmhost.reclaim.policy.replay import replay

    windows = [{0, 1, 2, 3}, {4, 5}, {0}]
    trace = [(i, _words(gfns)) for i, gfns in enumerate(windows)]
    result = replay(trace, Fifo(64), 4)
    print(f"{result.evictions} evictions, {result.refaults} refault")


def _words(gfns: set[int]) -> Words:
    return np.array([sum(1 << gfn for gfn in gfns)], dtype=np.uint64)


if __name__ == "__main__":
    main()
