"""Random victims: the baseline that other policies must beat."""

from __future__ import annotations

import numpy as np

from kvmhost.bitmap import Words
from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy.base import Everything, Gfns, HarvestPlan, Mask, Probe, check_mask

__all__ = ["Random"]


class Random:
    """Evicts candidates with equal probability; the same seed gives the same victims.

    :raises LayoutError: if there are no pages
    """

    name = "random"

    def __init__(self, n_pages: int, seed: int = 1) -> None:
        if n_pages <= 0:
            raise LayoutError(f"{n_pages} pages: need one or more")
        self._n_pages = n_pages
        self._chance = np.random.default_rng(seed)
        self._evicted = 0

    @property
    def n_pages(self) -> int:
        """Number of pages that the policy covers."""
        return self._n_pages

    def plan(self, tables_young: Words | None = None) -> HarvestPlan:
        """Request all pages, as other policies do; the result is not used."""
        return Everything

    def refaulted(self, gfns: Gfns, now_ns: int) -> None:
        """Do nothing."""

    def age(self, young: Words, now_ns: int) -> None:
        """Do nothing."""

    def victims(self, n: int, candidates: Mask, now_ns: int, probe: Probe | None = None) -> Gfns:
        """Draw ``n`` of the candidates.

        :raises LayoutError: if the mask has another size
        """
        check_mask(candidates, self._n_pages)
        pages = np.flatnonzero(candidates)
        return self._chance.permutation(pages)[: max(n, 0)]

    def evicted(self, gfns: Gfns, now_ns: int) -> None:
        """Count the pages."""
        self._evicted += int(gfns.size)

    def sizes(self, pages: Mask) -> list[tuple[int, int]]:
        """Return all pages as one generation."""
        check_mask(pages, self._n_pages)
        return [(0, int(pages.sum()))]

    def counters(self) -> dict[str, float]:
        """Return the number of evicted pages."""
        return {"evicted": self._evicted}

    def explain(self, gfn: int) -> dict[str, int | float | str]:
        """Return nothing: the policy keeps no state per page."""
        return {}
