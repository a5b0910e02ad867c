"""Multi-generational LRU over harvested bitmaps, after the kernel's ``lru_gen``.

Each page carries a sequence number. ``max_seq`` is the youngest generation and
``min_seq`` the oldest. An aging pass opens a new youngest generation and moves the
pages that were young into it; nothing else moves, so a page's generation says when
it was last seen. Where more than ``n_generations`` would be open, the two oldest
become one. Eviction takes from the oldest generation, and never from the two
youngest: a page has to stay untouched for two whole windows.

Departs from the kernel: one list entry a page is one number in an array, so that
aging costs a few passes over an array and no list is moved; there are no types, no
tiers and no refault controller yet; the walk is the tracker's, over the whole guest.
"""

from __future__ import annotations

import numpy as np

from kvmhost.bitmap import Words, unpack
from kvmhost.errors import LayoutError
from reclaim.policy.base import Everything, Gfns, Mask, Plan, Probe, check_mask, check_words

__all__ = ["MIN_GENERATIONS", "PROTECTED", "LruGen"]

#: Of which two are protected; as MAX_NR_GENS, Linux v6.12, include/linux/mmzone.h.
MIN_GENERATIONS = 4
#: The youngest generations, which are never evicted; MIN_NR_GENS.
PROTECTED = 2


class LruGen:
    """Generations over the pages ``[0, n_pages)`` of one VM.

    A new one knows nothing: all pages are in one generation, which becomes old
    enough for eviction after two aging passes.

    :param n_generations: 4 or more
    :param seed: take the pages within a generation in an order of its own; None: by gfn
    :raises LayoutError: for fewer generations, or no pages
    """

    name = "lru_gen"

    def __init__(self, n_pages: int, n_generations: int = 4, seed: int | None = None) -> None:
        if n_generations < MIN_GENERATIONS:
            raise LayoutError(f"{n_generations} generations: need {MIN_GENERATIONS} or more")
        if n_pages <= 0:
            raise LayoutError(f"{n_pages} pages: need one or more")
        self.n_generations = n_generations
        self.min_seq = self.max_seq = 0
        self.seq = np.zeros(n_pages, dtype=np.uint32)
        self._chance = None if seed is None else np.random.default_rng(seed)

    @property
    def n_pages(self) -> int:
        """Pages it knows of."""
        return self.seq.size

    def plan(self, tables_young: Words | None = None) -> Plan:
        """Ask for everything."""
        return Everything

    def age(self, young: Words, now_ns: int) -> None:
        """Open a new youngest generation and move the young pages there.

        :raises LayoutError: if the bitmap has another size
        """
        check_words(young, self.n_pages)
        self.max_seq += 1
        self.seq[unpack(young, self.n_pages)] = self.max_seq
        oldest = self.max_seq - self.n_generations + 1
        if oldest > self.min_seq:
            self.min_seq = oldest
            np.maximum(self.seq, oldest, out=self.seq)

    def evicted(self, gfns: Gfns, now_ns: int) -> None:
        """Nothing to note: a page that comes back is young then."""

    def refaulted(self, gfns: Gfns, now_ns: int) -> None:
        """Move pages to the youngest generation."""
        self.seq[gfns] = self.max_seq

    def victims(self, n: int, candidates: Mask, now_ns: int, probe: Probe | None = None) -> Gfns:
        """Return up to ``n`` candidates, those of the oldest generation first.

        :raises LayoutError: if the mask has another size
        """
        check_mask(candidates, self.n_pages)
        chosen: list[Gfns] = []
        for generation in range(self.min_seq, self.max_seq - PROTECTED + 1):
            if n <= 0:
                break
            pages = np.flatnonzero(candidates & (self.seq == generation))
            if self._chance is not None:
                self._chance.shuffle(pages)
            chosen.append(pages[:n])
            n -= chosen[-1].size
        return np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)

    def sizes(self, pages: Mask) -> list[tuple[int, int]]:
        """Return (sequence number, how many of the pages are there), the oldest first."""
        check_mask(pages, self.n_pages)
        counts = np.bincount(
            self.seq[pages] - np.uint32(self.min_seq), minlength=self.max_seq - self.min_seq + 1
        )
        return [(self.min_seq + i, int(count)) for i, count in enumerate(counts)]

    def counters(self) -> dict[str, float]:
        """Return the sequence numbers."""
        return {"min_seq": self.min_seq, "max_seq": self.max_seq}

    def explain(self, gfn: int) -> dict[str, int | float | str]:
        """Return a page's generation."""
        return {"seq": int(self.seq[gfn])}
