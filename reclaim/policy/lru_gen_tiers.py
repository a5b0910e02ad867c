"""Which tiers of pages eviction should spare, learned from refaults.

After the controller of the kernel's multi-generational LRU (mm/vmscan.c, Linux v6.12):
its proportional part is the share of what a tier lost (evicted, or protected from it)
that came back; its integral part the moving average of that over the generations that
went before, by halves. The set point is the first tier. A tier that refaults clearly
more than the first is protected, and so are those above it.

A page's tier is the logarithm of the number of windows that saw it, of those that are
remembered: 0; 1; 2 to 3; 4 to 7; 8 and more.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["IS_OVERDUE", "MIN_LRU_BATCH", "N_TIERS", "TIER_OF", "Tiers"]

#: Evidence below so many refaults is none; BITS_PER_LONG, as in the kernel.
MIN_LRU_BATCH = 64
N_TIERS = 5
#: Gains of the first tier and of the others: a margin of 2:3 (since Linux v6.11).
_GAIN_FIRST, _GAIN_OTHER = 2, 3

#: A generation, as evidence, is one page in so many.
_GENERATION_SHARE = 32

Counts = npt.NDArray[np.int64]


def _tiers_of_histories() -> npt.NDArray[np.uint8]:
    """order_base_2(windows seen + 1) for each 16-bit history, at most the last tier."""
    bits = np.unpackbits(np.arange(1 << 16, dtype="<u2").view(np.uint8)).reshape(-1, 16)
    refs = bits.sum(axis=1)
    tiers = np.ceil(np.log2(refs + 1)).astype(np.uint8)
    capped: npt.NDArray[np.uint8] = np.minimum(tiers, N_TIERS - 1).astype(np.uint8)
    return capped


#: Tier by history.
TIER_OF = _tiers_of_histories()


def _overdue_histories() -> npt.NDArray[np.bool_]:
    """Not seen for twice the mean interval, or missing after (nearly) every window before."""
    histories = np.arange(1 << 16, dtype="<u2")
    refs = np.unpackbits(histories.view(np.uint8)).reshape(-1, 16).sum(axis=1, dtype=np.int64)
    idle = 16 - np.ceil(np.log2(histories.astype(np.float64) + 1)).astype(np.int64)
    overdue: npt.NDArray[np.bool_] = (idle * refs >= 32) | ((idle >= 1) & (refs >= 14))
    return overdue


#: By history. Whatever such a page was, it may have ceased to be it: no tier protects it.
IS_OVERDUE = _overdue_histories()


class Tiers:
    """Counts by tier, and the decision that follows from them."""

    def __init__(self) -> None:
        self.avg_refaulted: Counts = np.zeros(N_TIERS, dtype=np.int64)
        self.avg_total: Counts = np.zeros(N_TIERS, dtype=np.int64)
        self.refaulted: Counts = np.zeros(N_TIERS, dtype=np.int64)
        self.evicted: Counts = np.zeros(N_TIERS, dtype=np.int64)
        self.protected: Counts = np.zeros(N_TIERS, dtype=np.int64)

    def note_refaulted(self, tiers: npt.NDArray[np.uint8]) -> None:
        """Count pages that came back, by their tier when they went."""
        self.refaulted += _count(tiers)

    def note_evicted(self, tiers: npt.NDArray[np.uint8]) -> None:
        """Count pages that went."""
        self.evicted += _count(tiers)

    def note_protected(self, tiers: npt.NDArray[np.uint8]) -> None:
        """Count pages that would have gone had their tier not been protected."""
        self.protected += _count(tiers)

    def carry_over(self, n_pages: int) -> None:
        """Fold the counts into the averages, once as many pages went as make a generation.

        With a harvest a generation few pages go in each, too few to be evidence: one is
        taken to be a 32nd of the pages.
        """
        if int(self.evicted.sum()) * _GENERATION_SHARE < n_pages:
            return
        self.avg_refaulted = (self.avg_refaulted + self.refaulted) // 2
        self.avg_total = (self.avg_total + self.evicted + self.protected) // 2
        for counts in (self.refaulted, self.evicted, self.protected):
            counts[:] = 0

    def last_evictable(self) -> int:
        """Return the highest tier that is not protected."""
        refaulted = self.avg_refaulted + self.refaulted
        total = self.avg_total + self.evicted + self.protected
        for tier in range(1, N_TIERS):
            if not _within_margin(
                int(refaulted[0]), int(total[0]), int(refaulted[tier]), int(total[tier])
            ):
                return tier - 1
        return N_TIERS - 1


def _within_margin(sp_refaulted: int, sp_total: int, refaulted: int, total: int) -> bool:
    """Whether a tier refaults too little to count, or not clearly more than the first."""
    return (
        refaulted < MIN_LRU_BATCH
        or refaulted * (sp_total + MIN_LRU_BATCH) * _GAIN_FIRST
        <= (sp_refaulted + 1) * total * _GAIN_OTHER
    )


def _count(tiers: npt.NDArray[np.uint8]) -> Counts:
    return np.bincount(tiers, minlength=N_TIERS).astype(np.int64, copy=False)
