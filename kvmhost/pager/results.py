"""What became of pages: their states, and the results of a batch, counted per page."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
import numpy.typing as npt

__all__ = [
    "DropResult",
    "EvictOutcome",
    "EvictResult",
    "PageState",
    "RestoreResult",
    "ShrinkResult",
]


class PageState(enum.IntEnum):
    """Where a page's contents are."""

    RESIDENT = 0  # in the memfd
    EVICTED = 1  # in the store only
    LOST = 2  # the store could not give it back; the VM stops
    FRESH = 3  # never touched
    SWAPPED = 4  # the memfd's, seen in the host's swap


class EvictOutcome(enum.IntEnum):
    """What became of one page that was to be evicted."""

    DONE = 0
    PINNED = 1  # holds live tables or the parameter page
    ABSENT = 2  # evicted already, or never touched
    FULL = 3  # the store's limit is reached
    REFUSED = 4  # does not compress
    ERROR = 5  # a system call or the store failed
    STAYED = 6  # in a huge page that could not be split; its bytes are there


@dataclasses.dataclass(frozen=True)
class EvictResult:
    """Outcome of a batch: ``outcomes[i]`` belongs to the i-th gfn (``uint8``)."""

    gfns: npt.NDArray[np.int64]
    outcomes: npt.NDArray[np.uint8]

    def count(self, outcome: EvictOutcome) -> int:
        """Return how many pages ended that way."""
        return int((self.outcomes == outcome).sum())

    def by_name(self) -> dict[str, int]:
        """Return every outcome with its number of pages."""
        return {outcome.name.lower(): self.count(outcome) for outcome in EvictOutcome}


@dataclasses.dataclass(frozen=True)
class RestoreResult:
    """Pages that were in the store, by what became of them.

    ``left`` are in the store still: the host had no memory for them.
    """

    restored: int
    lost: int
    left: int


@dataclasses.dataclass(frozen=True)
class ShrinkResult:
    """What was done to make the resident limit hold.

    ``over_pages`` are resident above it still, since nothing else could go; 0: it holds.
    """

    evicted: int
    over_pages: int


@dataclasses.dataclass(frozen=True)
class DropResult:
    """Pages that the guest declared free, by what became of them."""

    dropped: int
    pinned: int
    failed: int
