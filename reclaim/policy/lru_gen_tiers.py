"""Select the tiers that eviction protects, from the refaults of each tier.

Modelled on the controller of the kernel's multi-generational LRU (mm/vmscan.c, Linux
v6.12): its proportional term is the refaulted share of the pages that a tier lost
(evicted) or would have lost (protected); its integral term is the exponential moving
average of that share over previous generations, with a factor of one half. The set point
is the first tier. A tier that refaults clearly more than the first is protected, and so
are the tiers above it.

The tier of a page is the logarithm of the number of windows in its history in which it
was young: 0; 1; 2 to 3; 4 to 7; 8 or more.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["IS_OVERDUE", "MIN_LRU_BATCH", "N_TIERS", "TIER_OF", "Tiers"]

#: Fewer refaults than this are not significant; BITS_PER_LONG, as in the kernel.
MIN_LRU_BATCH = 64
N_TIERS = 5
#: Gains of the first tier and of the others: a ratio of 2:3 (since Linux v6.11).
_GAIN_FIRST, _GAIN_OTHER = 2, 3

#: The averages are updated after one in this number of pages was evicted.
_GENERATION_SHARE = 32

Counts = npt.NDArray[np.int64]


def _tiers_of_histories() -> npt.NDArray[np.uint8]:
    """Return order_base_2(windows + 1) for each 16-bit history, at most the last tier."""
    bits = np.unpackbits(np.arange(1 << 16, dtype="<u2").view(np.uint8)).reshape(-1, 16)
    refs = bits.sum(axis=1)
    tiers = np.ceil(np.log2(refs + 1)).astype(np.uint8)
    capped: npt.NDArray[np.uint8] = np.minimum(tiers, N_TIERS - 1).astype(np.uint8)
    return capped


#: Tier by history.
TIER_OF = _tiers_of_histories()


def _overdue_histories() -> npt.NDArray[np.bool_]:
    """Return which histories are overdue.

    That is, the page was not young for twice its mean interval, or it was not young in the
    last windows after being young in (nearly) every window before.
    """
    histories = np.arange(1 << 16, dtype="<u2")
    refs = np.unpackbits(histories.view(np.uint8)).reshape(-1, 16).sum(axis=1, dtype=np.int64)
    idle = 16 - np.ceil(np.log2(histories.astype(np.float64) + 1)).astype(np.int64)
    overdue: npt.NDArray[np.bool_] = (idle * refs >= 32) | ((idle >= 1) & (refs >= 14))
    return overdue


#: By history. The access pattern of an overdue page may have changed: no tier protects it.
IS_OVERDUE = _overdue_histories()


class Tiers:
    """Counts by tier, and the protection that follows from them."""

    def __init__(self) -> None:
        self.avg_refaulted: Counts = np.zeros(N_TIERS, dtype=np.int64)
        self.avg_total: Counts = np.zeros(N_TIERS, dtype=np.int64)
        self.refaulted: Counts = np.zeros(N_TIERS, dtype=np.int64)
        self.evicted: Counts = np.zeros(N_TIERS, dtype=np.int64)
        self.protected: Counts = np.zeros(N_TIERS, dtype=np.int64)

    def note_refaulted(self, tiers: npt.NDArray[np.uint8]) -> None:
        """Count refaulted pages by the tier that they had when they were evicted."""
        self.refaulted += _count(tiers)

    def note_evicted(self, tiers: npt.NDArray[np.uint8]) -> None:
        """Count evicted pages."""
        self.evicted += _count(tiers)

    def note_protected(self, tiers: npt.NDArray[np.uint8]) -> None:
        """Count pages that were not evicted because their tier is protected."""
        self.protected += _count(tiers)

    def carry_over(self, n_pages: int) -> None:
        """Update the averages from the counts once enough pages were evicted.

        Each harvest opens a generation, and too few pages are evicted in one to be
        significant: the counts are carried over once they cover a 32nd of the pages.
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
