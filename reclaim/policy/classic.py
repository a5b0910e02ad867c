"""Active and inactive lists, scanned page by page: reclaim before multi-generational LRU.

This is the "off" case of the 2023 measurements. It serves as a baseline and is never the
default. Nothing is harvested in advance. When pages must be evicted, the inactive list is
scanned from its tail: each page is tested and cleared individually, under the MMU lock
and with a flush (``clear_flush_young``). A young page is activated, an old page is
evicted. While the inactive list is low, the active list is deactivated from its tail in
batches of 32. A page that refaults is activated immediately if fewer pages were evicted
since its eviction than are active.

Without a probe, all pages are harvested, and the harvested bits are used for the tests.

After ``shrink_active_list`` and ``shrink_inactive_list`` (mm/vmscan.c) and
``workingset_refault`` (mm/workingset.c), Linux v6.12, as they treat anonymous pages
without swap read-ahead. Departs from them: one order number per page represents the
lists; the scan continues until enough pages are found, while the kernel raises the scan
priority in steps.
"""

from __future__ import annotations

import math

import numpy as np

from kvmhost.bitmap import Words, n_words
from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy.base import (
    Everything,
    Gfns,
    HarvestPlan,
    Mask,
    Probe,
    check_mask,
    check_words,
)

__all__ = ["SWAP_CLUSTER_MAX", "Classic"]

SWAP_CLUSTER_MAX = 32
_OFF, _INACTIVE, _ACTIVE, _GONE = 0, 1, 2, 3


class Classic:
    """Two lists over the pages ``[0, n_pages)``.

    :param probes: the caller passes a probe to :meth:`victims`; otherwise all pages are
        harvested in advance, and the tests use the harvested bits
    :raises LayoutError: if there are no pages
    """

    name = "classic"

    def __init__(self, n_pages: int, *, probes: bool = False) -> None:
        if n_pages <= 0:
            raise LayoutError(f"{n_pages} pages: need one or more")
        self.probes = probes
        self.state = np.zeros(n_pages, dtype=np.uint8)
        #: Position in its list, lowest at the tail; of an evicted page: its non-resident age.
        self.order = np.zeros(n_pages, dtype=np.uint32)
        self._next = 1
        self._nonresident_age = 0
        self._young: Words = np.zeros(n_words(n_pages), dtype=np.uint64)
        # Largest ratio of the active list to the inactive list (inactive_is_low).
        self._ratio = max(1, math.isqrt(10 * n_pages >> 18))
        self._counts = dict.fromkeys(
            ("tested", "activated", "deactivated", "refaulted", "evicted"), 0
        )

    @property
    def n_pages(self) -> int:
        """Number of pages that the policy covers."""
        return self.state.size

    def plan(self, tables_young: Words | None = None) -> HarvestPlan:
        """Request no pages if there is a probe, which tests pages as the scan reaches them."""
        if not self.probes:
            return Everything
        return HarvestPlan(np.zeros_like(self._young), batched=False)

    def refaulted(self, gfns: Gfns, now_ns: int) -> None:
        """Put pages at the head of a list, by their refault distance."""
        n_active = int((self.state == _ACTIVE).sum())
        distance = self._nonresident_age - self.order[gfns].astype(np.int64)
        back = self.state[gfns] == _GONE
        soon = back & (distance <= n_active)
        self._counts["refaulted"] += int(back.sum())
        self._counts["activated"] += int(soon.sum())
        self._add(gfns, np.where(soon, _ACTIVE, _INACTIVE).astype(np.uint8))

    def age(self, young: Words, now_ns: int) -> None:
        """Keep harvested bits for later tests.

        :raises LayoutError: if the bitmap has another size
        """
        check_words(young, self.n_pages)
        self._young = self._young | young

    def victims(self, n: int, candidates: Mask, now_ns: int, probe: Probe | None = None) -> Gfns:
        """Scan the lists for ``n`` pages, in at most two rounds.

        :raises LayoutError: if the mask has another size
        """
        check_mask(candidates, self.n_pages)
        unknown = np.flatnonzero(candidates & ((self.state == _OFF) | (self.state == _GONE)))
        self._add(unknown, np.full(unknown.size, _INACTIVE, dtype=np.uint8))
        chosen: list[int] = []
        taken = np.zeros(self.n_pages, dtype=bool)
        for _ in range(2):
            self._deactivate(candidates & ~taken, probe)
            for gfn in self._tail_first(candidates & ~taken & (self.state == _INACTIVE)):
                if len(chosen) >= n:
                    break
                if self._test(int(gfn), probe):
                    self._add(np.array([gfn]), np.array([_ACTIVE], dtype=np.uint8))
                    self._counts["activated"] += 1
                else:
                    chosen.append(int(gfn))
                    taken[gfn] = True
        return np.array(chosen, dtype=np.int64)

    def _deactivate(self, candidates: Mask, probe: Probe | None) -> None:
        """Move from the active list's tail until the inactive list is not low."""
        active = self._tail_first(candidates & (self.state == _ACTIVE))
        n_inactive = int((candidates & (self.state == _INACTIVE)).sum())
        first = 0
        while first < active.size and n_inactive * self._ratio < active.size - first:
            batch = active[first : first + SWAP_CLUSTER_MAX]
            for gfn in batch:
                # The bit is cleared so that only later touches count; a page is deactivated
                # whether it was young or not.
                self._test(int(gfn), probe)
            self._add(batch, np.full(batch.size, _INACTIVE, dtype=np.uint8))
            self._counts["deactivated"] += int(batch.size)
            n_inactive += int(batch.size)
            first += SWAP_CLUSTER_MAX

    def _test(self, gfn: int, probe: Probe | None) -> bool:
        word, bit = gfn // 64, np.uint64(1 << gfn % 64)
        young = bool(self._young[word] & bit)
        self._young[word] &= ~bit
        self._counts["tested"] += 1
        if probe is not None:
            young = probe.clear_flush_young(gfn) or young
        return young

    def _add(self, gfns: Gfns, states: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        """Put pages at the head of lists, in the given order."""
        self.state[gfns] = states
        self.order[gfns] = np.arange(self._next, self._next + gfns.size, dtype=np.uint32)
        self._next += int(gfns.size)

    def _tail_first(self, pages: Mask) -> Gfns:
        gfns = np.flatnonzero(pages)
        return gfns[np.argsort(self.order[gfns], kind="stable")]

    def evicted(self, gfns: Gfns, now_ns: int) -> None:
        """Record the non-resident age at which pages were evicted."""
        self.state[gfns] = _GONE
        first = self._nonresident_age + 1
        self.order[gfns] = np.arange(first, first + gfns.size, dtype=np.uint32)
        self._nonresident_age += int(gfns.size)
        self._counts["evicted"] += int(gfns.size)

    def sizes(self, pages: Mask) -> list[tuple[int, int]]:
        """Return the lists as generations: 0 is inactive or not yet seen, 1 is active."""
        check_mask(pages, self.n_pages)
        n_active = int((pages & (self.state == _ACTIVE)).sum())
        return [(0, int(pages.sum()) - n_active), (1, n_active)]

    def counters(self) -> dict[str, float]:
        """Return the counters of the scans."""
        return {**self._counts, "active": int((self.state == _ACTIVE).sum())}

    def explain(self, gfn: int) -> dict[str, int | float | str]:
        """Return which list a page is on.

        :raises LayoutError: if the gfn is out of range
        """
        if not 0 <= gfn < self.n_pages:
            raise LayoutError(f"gfn {gfn:#x} outside [0, {self.n_pages:#x})")
        names = ("unknown", "inactive", "active", "gone")
        return {"list": names[self.state[gfn]], "order": int(self.order[gfn])}
