"""History of each page of one VM, in 14 bytes per page; ``explain`` reads it.

It holds the young bits of the last 32 windows, the last action on the page with its
reason and pass, and the number of evictions and refaults (both saturate at 65,535).
Older events are only in the decisions file, if one is configured.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec
import numpy as np

from kvmhost.bitmap import Words, unpack
from kvmhost.reclaim.account.decisions import EvictReason
from kvmhost.reclaim.policy.base import Gfns

__all__ = ["WINDOWS", "PageAction", "PageHistory", "PageStory"]

#: Windows whose young bits are kept.
WINDOWS = 32


class PageAction(enum.IntEnum):
    """The last event of a page."""

    NONE = 0
    EVICTED = 1
    WOULD_EVICT = 2
    CAME_BACK = 3
    CAME_FIRST = 4  # became resident without a previous eviction
    PINNED = 5  # eviction refused: the page is pinned
    FULL = 6
    REFUSED = 7
    FAILED = 8
    ABSENT = 9  # was not resident any more


#: The event for each outcome of an eviction, by outcome number.
OUTCOMES = (
    PageAction.EVICTED,
    PageAction.PINNED,
    PageAction.ABSENT,
    PageAction.FULL,
    PageAction.REFUSED,
    PageAction.FAILED,
)


class PageStory(msgspec.Struct, frozen=True):
    """The history of one page."""

    gfn: int
    """the page"""
    passes: int
    """passes of the VM so far"""
    windows: list[bool]
    """whether it was young in each of the last windows, newest first"""
    young_passes: list[int]
    """the passes that found it young, newest first; each moved it to the youngest generation"""
    action: str
    """what was done to it last"""
    action_pass: int
    """the pass that did it"""
    why: str
    """the reason, by name"""
    why_text: str
    """the reason in words"""
    evictions: int
    """how often it was evicted"""
    refaults: int
    """how often it came back"""


class PageHistory:
    """The pages ``[0, n_pages)`` of one VM. Not safe for several threads."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages, self.passes = n_pages, 0
        self._windows = np.zeros(n_pages, dtype=np.uint32)
        self._act = np.zeros(n_pages, dtype=np.uint8)
        self._why = np.zeros(n_pages, dtype=np.uint8)
        self._when = np.zeros(n_pages, dtype=np.uint32)
        self._evictions = np.zeros(n_pages, dtype=np.uint16)
        self._refaults = np.zeros(n_pages, dtype=np.uint16)

    @property
    def n_bytes(self) -> int:
        """Memory that the history uses."""
        arrays = (self._windows, self._act, self._why, self._when, self._evictions, self._refaults)
        return sum(array.nbytes for array in arrays)

    def window(self, young: Words) -> None:
        """Record the harvest with which a pass begins."""
        self.passes += 1
        np.left_shift(self._windows, 1, out=self._windows)
        self._windows[unpack(young, self.n_pages)] |= 1

    def evicted(
        self, gfns: Gfns, outcomes: np.ndarray[Any, np.dtype[np.uint8]], why: EvictReason
    ) -> None:
        """Record the outcome of each page of an eviction request."""
        acts = np.array(OUTCOMES, dtype=np.uint8)[np.minimum(outcomes, len(OUTCOMES) - 1)]
        self._note(gfns, acts, why)
        _count(self._evictions, gfns[acts == PageAction.EVICTED])

    def evicted_by_vm(self, gfns: Gfns, why: EvictReason) -> None:
        """Record pages that the VM evicted without a request of the daemon."""
        self._note(gfns, PageAction.EVICTED, why)
        _count(self._evictions, gfns)

    def would_evict(self, gfns: Gfns, why: EvictReason) -> None:
        """Record pages that a dry run would have evicted."""
        self._note(gfns, PageAction.WOULD_EVICT, why)
        _count(self._evictions, gfns)

    def became_resident(self, refaulted: Gfns, first: Gfns) -> None:
        """Record pages that became resident, after an eviction or for the first time."""
        self._note(first, PageAction.CAME_FIRST, EvictReason.NONE)
        # The reason of the eviction stays: readers ask for it after the refault.
        self._act[refaulted], self._when[refaulted] = PageAction.CAME_BACK, self.passes
        _count(self._refaults, refaulted)

    def story(self, gfn: int) -> PageStory:
        """Return the history of one page.

        :raises IndexError: if the page does not exist
        """
        bits = int(self._windows[gfn])
        known = min(self.passes, WINDOWS)
        windows = [bool(bits >> age & 1) for age in range(known)]
        why = EvictReason(int(self._why[gfn]))
        return PageStory(
            gfn=gfn,
            passes=self.passes,
            windows=windows,
            young_passes=[self.passes - age for age, young in enumerate(windows) if young],
            action=PageAction(int(self._act[gfn])).name.lower(),
            action_pass=int(self._when[gfn]),
            why=why.name.lower(),
            why_text=why.text,
            evictions=int(self._evictions[gfn]),
            refaults=int(self._refaults[gfn]),
        )

    def _note(self, gfns: Gfns, act: Any, why: EvictReason) -> None:
        self._act[gfns], self._why[gfns], self._when[gfns] = act, why, self.passes


def _count(counters: np.ndarray[Any, np.dtype[np.uint16]], gfns: Gfns) -> None:
    """Increment saturating counters."""
    counters[gfns] += counters[gfns] < np.iinfo(np.uint16).max
