"""What the daemon knows of one VM's pages: where they are, and who sent them away.

In a dry run nothing goes, and yet the next decision has to follow from this one. So
pages that would have gone are kept in a mask of their own: they count as away until
they are young, which is when they would have come back.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kvmhost.control.schema import MemoryMap
from kvmhost.reclaim.policy.base import Gfns, Mask

__all__ = ["Arrivals", "VmView"]


@dataclasses.dataclass(frozen=True)
class Arrivals:
    """What changed between two looks, without the daemon's own evictions.

    :param went: the VM's fault handler evicted them
    :param back: had been evicted, and are resident again
    :param first: resident for the first time, as far as is known
    :param regretted: of those back, how many the daemon itself had sent away
    """

    went: Gfns
    back: Gfns
    first: Gfns
    regretted: int

    @property
    def came(self) -> Gfns:
        """All that became resident."""
        return np.union1d(self.back, self.first)


class VmView:
    """Masks over the pages ``[0, n_pages)`` of one VM."""

    def __init__(self, memory: MemoryMap) -> None:
        self.n_pages = memory.gfn_end
        #: In a region, and not pinned.
        self.movable: Mask = np.zeros(self.n_pages, dtype=bool)
        for region in memory.regions:
            self.movable[region.gfn : region.gfn + region.n_pages] = True
        for pinned in memory.pinned:
            self.movable[pinned.gfn : pinned.gfn + pinned.n_pages] = False
        self.n_pinned = sum(pinned.n_pages for pinned in memory.pinned)
        self.resident: Mask = np.zeros(self.n_pages, dtype=bool)
        self._looked = False
        self._gone: Mask = np.zeros(self.n_pages, dtype=bool)
        self._ours: Mask = np.zeros(self.n_pages, dtype=bool)
        self._away: Mask | None = None
        #: Young in the last window, and in the one before.
        self._young = self._young_before = self._gone

    @property
    def n_resident(self) -> int:
        """Resident pages."""
        return int(np.count_nonzero(self.resident))

    @property
    def candidates(self) -> Mask:
        """Pages that may be evicted."""
        return self.resident & self.movable

    @property
    def n_working(self) -> int:
        """Resident pages that were young in one of the last two windows, and pinned ones."""
        lately = (self._young | self._young_before) & self.resident & self.movable
        return int(np.count_nonzero(lately)) + self.n_pinned

    def look(self, resident: Mask, young: Mask) -> Arrivals:
        """Take what is resident and what was young; return what changed."""
        self._young, self._young_before = young, self._young
        now = resident.copy()
        if self._away is not None:
            self._away &= ~young
            now &= ~self._away
        before, self.resident = self.resident, now
        if not self._looked:
            self._looked = True
            nothing = np.empty(0, dtype=np.int64)
            return Arrivals(nothing, nothing, nothing, 0)
        went, came = before & ~now, now & ~before
        self._gone |= went
        back, first = came & self._gone, came & ~self._gone
        regretted = int(np.count_nonzero(back & self._ours))
        self._gone &= ~now
        self._ours &= ~now
        return Arrivals(
            np.flatnonzero(went), np.flatnonzero(back), np.flatnonzero(first), regretted
        )

    def note_evicted(self, gfns: Gfns, dry: bool = False) -> None:
        """Take pages that the daemon sent away, or in a dry run would have."""
        self.resident[gfns] = False
        self._gone[gfns] = self._ours[gfns] = True
        if dry:
            if self._away is None:
                self._away = np.zeros(self.n_pages, dtype=bool)
            self._away[gfns] = True
