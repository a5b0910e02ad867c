"""Which pages a harvest clears, where clearing all of them would cost the guest too much.

A page costs the guest a fault each time that it is touched after it was cleared. So pages that
nobody touches cost nothing: they stay clear, and the next touch of each is seen at once. What
costs is the pages that are found young at every harvest. A harvest need not clear those: one
that is not cleared stays young for the policy until it is.

A page is *known* if its bit was clear after the last harvest: the harvest then tells exactly
whether it was touched in the window. A page that was left uncleared is not known, and counts as
young. A page that was found young in two windows in which it was known is *steady*, until a
window in which it is known and not young. The others are *changing*. Each class is cleared in a
share of its own, so that a policy learns at once that a scan has passed, or that a page that was
cold is in use, while the working set is only asked in rotation whether it still is one.

Pages take turns by groups of 64: each range that is zapped flushes the TLBs of running vCPUs.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, n_words

__all__ = ["ALL", "ByClass", "Clearing", "HarvestFacts", "PageClasses"]


class ByClass(NamedTuple):
    """A number of pages of each class."""

    steady: float
    changing: float

    def __add__(self, other: object) -> ByClass:
        """Return the sums."""
        if not isinstance(other, ByClass):
            return NotImplemented
        return ByClass(self.steady + other.steady, self.changing + other.changing)


@dataclasses.dataclass(frozen=True)
class Clearing:
    """Which share of the young pages each harvest clears, in rotation, and how often it is done.

    :param steady: share of the steady pages, in (0, 1]
    :param changing: share of the others
    :param stretch: factor on the interval between two harvests, 1 or more
    """

    steady: float = 1.0
    changing: float = 1.0
    stretch: float = 1.0

    @property
    def clears_all(self) -> bool:
        """Whether each harvest clears every young page."""
        return self.steady >= 1 and self.changing >= 1

    @property
    def stale_passes(self) -> float:
        """Passes, of the given interval, after which an unused page is known to be unused."""
        turns = 1 / min(self.steady, self.changing)
        return turns * self.stretch if turns > 1 else self.stretch

    def at_most(self, share: float) -> Clearing:
        """Return the same with no share above a given one."""
        return Clearing(min(self.steady, share), min(self.changing, share), self.stretch)


#: Every young page, at each interval.
ALL = Clearing()


@dataclasses.dataclass(frozen=True)
class HarvestFacts:
    """What one harvest showed about the cost of clearing.

    :param young: pages whose bit was set, by their class from now on
    :param cleared: those of them that the harvest cleared
    :param faults: known pages that were touched in the window, by their class until now: each
        touch was a fault, unless the page was touched for the first time ever
    """

    young: ByClass
    cleared: ByClass
    faults: ByClass


class PageClasses:
    """The classes of the pages ``[0, n_pages)``, and whose turn it is. Three bits a page."""

    def __init__(self, n_pages: int) -> None:
        size = n_words(n_pages)
        #: Set and not cleared; young when last known; young when known twice in a row.
        self._left, self._young, self._steady = (np.zeros(size, dtype=np.uint64) for _ in range(3))
        # Hashed, so that a strided workload is spread over all turns.
        groups = np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self._turns = (groups >> np.uint64(32)).astype(np.uint32)
        self._phases = [0.0, 0.0]

    @property
    def n_steady(self) -> int:
        """Number of steady pages."""
        return _count(self._steady)

    def mask(self, clearing: Clearing) -> Words | None:
        """Return the pages that the next harvest clears, and go on to the next turn.

        :return: None: all
        """
        if clearing.clears_all:
            return None
        steady, changing = self._turn(0, clearing.steady), self._turn(1, clearing.changing)
        mask = self._steady.copy()
        mask[~steady] = 0
        mask[changing] |= ~self._steady[changing]
        return mask

    def note(self, young: Words, mask: Words | None, scanned: Words | None = None) -> HarvestFacts:
        """Update the classes by one harvest.

        :param young: all pages that it found young, also those that it did not clear
        :param mask: the pages that it cleared if they were young; None: all
        :param scanned: the pages that it looked at, of others nothing is known; None: all
        """
        # What was left, and is not young now, was cleared by the tracker together with others.
        known = ~(self._left & young)
        if scanned is not None:
            known &= scanned
        touched = known & young
        faults = _by_class(touched, self._steady)
        self._steady = (self._steady & ~known) | (touched & self._young)
        self._young = (self._young & ~known) | touched
        cleared = young if mask is None else young & mask
        left = young & ~cleared
        self._left = left if scanned is None else left | (self._left & ~scanned)
        return HarvestFacts(
            _by_class(young, self._steady), _by_class(cleared, self._steady), faults
        )

    def note_cleared(self, pages: Words) -> None:
        """Note that pages were cleared between two harvests."""
        self._left &= ~pages

    def _turn(self, kind: int, share: float) -> npt.NDArray[np.bool_]:
        """Return the groups whose turn it is."""
        if share >= 1:
            return np.ones(self._turns.size, dtype=bool)
        first = self._phases[kind]
        self._phases[kind] = (first + share) % 1
        # Wraps around, as the turns do.
        behind = self._turns - np.uint32(int(first * (1 << 32)))
        return behind < np.uint32(int(share * (1 << 32)))


def _count(words: Words) -> int:
    if hasattr(np, "bitwise_count"):
        return int(np.bitwise_count(words).sum())
    return int(np.unpackbits(words.view(np.uint8)).sum())


def _by_class(pages: Words, steady: Words) -> ByClass:
    n_steady = _count(pages & steady)
    return ByClass(n_steady, _count(pages) - n_steady)
