"""Random victims: what a policy has to beat."""

from __future__ import annotations

import numpy as np

from kvmhost.bitmap import Words
from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy.base import Everything, Gfns, HarvestPlan, Mask, Probe, check_mask

__all__ = ["Random"]


class Random:
    """Evicts any candidate, all equally likely; the same seed gives the same ones.

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
        """Pages it knows of."""
        return self._n_pages

    def plan(self, tables_young: Words | None = None) -> HarvestPlan:
        """Ask for everything, as others do; it is not used."""
        return Everything

    def refaulted(self, gfns: Gfns, now_ns: int) -> None:
        """Nothing to note."""

    def age(self, young: Words, now_ns: int) -> None:
        """Nothing to note."""

    def victims(self, n: int, candidates: Mask, now_ns: int, probe: Probe | None = None) -> Gfns:
        """Draw ``n`` of the candidates.

        :raises LayoutError: if the mask has another size
        """
        check_mask(candidates, self._n_pages)
        pages = np.flatnonzero(candidates)
        return self._chance.permutation(pages)[: max(n, 0)]

    def evicted(self, gfns: Gfns, now_ns: int) -> None:
        """Count them."""
        self._evicted += int(gfns.size)

    def sizes(self, pages: Mask) -> list[tuple[int, int]]:
        """Return all pages as one generation."""
        check_mask(pages, self._n_pages)
        return [(0, int(pages.sum()))]

    def counters(self) -> dict[str, float]:
        """Return how many went."""
        return {"evicted": self._evicted}

    def explain(self, gfn: int) -> dict[str, int | float | str]:
        """Return nothing: it knows nothing of a page."""
        return {}
