"""States of pages, and the results of batch operations, per page."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
import numpy.typing as npt

__all__ = [
    "DropResult",
    "EvictOutcome",
    "EvictResult",
    "PageEvent",
    "PageEvents",
    "PageState",
    "RestoreResult",
    "ShrinkResult",
]


class PageState(enum.IntEnum):
    """Where a page's contents are."""

    RESIDENT = 0  # in the memfd
    EVICTED = 1  # in the store only
    LOST = 2  # the store could not restore it; the VM stops
    FRESH = 3  # never touched
    SWAPPED = 4  # in the memfd, swapped out by the host


class PageEvent(enum.IntEnum):
    """What happened to a page; evictions by whose decision."""

    EVICTED_DAEMON = 0  # requested by the holder of the VM's lease
    EVICTED_REQUEST = 1  # requested by anybody else
    EVICTED_LIMIT = 2  # chosen by the pager, to hold the resident limit
    EVICTED_MEMORY = 3  # chosen by the pager, because the host had no memory
    REFAULTED = 4  # brought back by a touch
    RESTORED = 5  # brought back without one: on request, or prefetched
    DROPPED = 6  # declared free by the guest


@dataclasses.dataclass(frozen=True)
class PageEvents:
    """Events from a number on, in order.

    :param gfns: shape ``(n,)``
    :param events: shape ``(n,)``: each page's :class:`PageEvent` (``uint8``)
    :param next: number of the next event, with which to ask again
    :param lost: events that were overwritten before they were read
    :param left: later events that were not returned
    """

    gfns: npt.NDArray[np.int64]
    events: npt.NDArray[np.uint8]
    next: int
    lost: int
    left: int = 0


class EvictOutcome(enum.IntEnum):
    """Outcome of the eviction of one page."""

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
        """Return the number of pages with an outcome."""
        return int((self.outcomes == outcome).sum())

    def by_name(self) -> dict[str, int]:
        """Return every outcome with its number of pages."""
        return {outcome.name.lower(): self.count(outcome) for outcome in EvictOutcome}


@dataclasses.dataclass(frozen=True)
class RestoreResult:
    """Outcome of a restore: evicted pages by result.

    ``left`` remain in the store: the host had no memory for them.
    """

    restored: int
    lost: int
    left: int


@dataclasses.dataclass(frozen=True)
class ShrinkResult:
    """Outcome of a shrink to the resident limit.

    ``over_pages`` remain above it because no further page can be evicted; 0: it holds.
    """

    evicted: int
    over_pages: int


@dataclasses.dataclass(frozen=True)
class DropResult:
    """Outcome of a drop: pages that the guest declared free, by result."""

    dropped: int
    pinned: int
    failed: int
