"""What happened to each page of one VM: 14 bytes a page, so that a page can be explained.

Kept are the tracker's bits of the last 32 windows, the last thing that was done to the
page with its reason and its pass, and how often it was evicted and came back (both stop
at 65,535). Anything older is in the file of decisions, if there is one.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec
import numpy as np

from kvmhost.bitmap import Words, unpack
from kvmhost.reclaim.account.decisions import Why
from kvmhost.reclaim.policy.base import Gfns

__all__ = ["WINDOWS", "Act", "PageHistory", "PageStory"]

#: Windows whose bits are kept.
WINDOWS = 32


class Act(enum.IntEnum):
    """The last thing that happened to a page."""

    NONE = 0
    EVICTED = 1
    WOULD_EVICT = 2
    CAME_BACK = 3
    CAME_FIRST = 4  # became resident, without having been evicted
    PINNED = 5  # was to be evicted, and the VM said no
    FULL = 6
    REFUSED = 7
    FAILED = 8
    ABSENT = 9  # was not there any more


#: What the VM's answer to an eviction means, by its number.
OUTCOMES = (Act.EVICTED, Act.PINNED, Act.ABSENT, Act.FULL, Act.REFUSED, Act.FAILED)


class PageStory(msgspec.Struct, frozen=True):
    """What is known of one page.

    :param windows: the last windows, the newest first: True where it was young
    :param joined: the passes at which it was seen young, the newest first; at each it
        moved to the generation that was the youngest one then
    """

    gfn: int
    passes: int
    windows: list[bool]
    joined: list[int]
    action: str
    action_pass: int
    why: str
    why_text: str
    evictions: int
    refaults: int


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
        """What it takes."""
        arrays = (self._windows, self._act, self._why, self._when, self._evictions, self._refaults)
        return sum(array.nbytes for array in arrays)

    def window(self, young: Words) -> None:
        """Take one harvest; a pass begins."""
        self.passes += 1
        np.left_shift(self._windows, 1, out=self._windows)
        self._windows[unpack(young, self.n_pages)] |= 1

    def evicted(self, gfns: Gfns, outcomes: np.ndarray[Any, np.dtype[np.uint8]], why: Why) -> None:
        """Take what became of pages that were to be evicted: the VM's outcome of each."""
        acts = np.array(OUTCOMES, dtype=np.uint8)[np.minimum(outcomes, len(OUTCOMES) - 1)]
        self._note(gfns, acts, why)
        _count(self._evictions, gfns[acts == Act.EVICTED])

    def went(self, gfns: Gfns, why: Why) -> None:
        """Take pages that went without this daemon's word."""
        self._note(gfns, Act.EVICTED, why)
        _count(self._evictions, gfns)

    def would_evict(self, gfns: Gfns, why: Why) -> None:
        """Take pages that a dry run would have evicted."""
        self._note(gfns, Act.WOULD_EVICT, why)
        _count(self._evictions, gfns)

    def came(self, back: Gfns, first: Gfns) -> None:
        """Take pages that became resident: back after an eviction, or else."""
        self._note(first, Act.CAME_FIRST, Why.NONE)
        # Why it went is what a reader asks about a page that came back.
        self._act[back], self._when[back] = Act.CAME_BACK, self.passes
        _count(self._refaults, back)

    def story(self, gfn: int) -> PageStory:
        """Tell one page.

        :raises IndexError: if there is no such page
        """
        bits = int(self._windows[gfn])
        known = min(self.passes, WINDOWS)
        windows = [bool(bits >> age & 1) for age in range(known)]
        why = Why(int(self._why[gfn]))
        return PageStory(
            gfn=gfn,
            passes=self.passes,
            windows=windows,
            joined=[self.passes - age for age, young in enumerate(windows) if young],
            action=Act(int(self._act[gfn])).name.lower(),
            action_pass=int(self._when[gfn]),
            why=why.name.lower(),
            why_text=why.text,
            evictions=int(self._evictions[gfn]),
            refaults=int(self._refaults[gfn]),
        )

    def _note(self, gfns: Gfns, act: Any, why: Why) -> None:
        self._act[gfns], self._why[gfns], self._when[gfns] = act, why, self.passes


def _count(counters: np.ndarray[Any, np.dtype[np.uint16]], gfns: Gfns) -> None:
    """Count up, and stop at the top."""
    counters[gfns] += counters[gfns] < np.iinfo(np.uint16).max
