"""Page state of one VM: which pages are resident, evicted, and evicted by the daemon.

A dry run evicts nothing, but each decision depends on the ones before it. Pages that a
dry run would have evicted are therefore kept in a separate mask and count as evicted
until they are young, which is when they would have been faulted in.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kvmhost.control.schema import MemoryMap
from kvmhost.reclaim.policy.base import Gfns, Mask

__all__ = ["ResidencyChanges", "VmPages"]


@dataclasses.dataclass(frozen=True)
class ResidencyChanges:
    """Changes between two harvests, except the daemon's own evictions.

    :param evicted_by_vm: evicted by the VM's fault handler
    :param refaulted: evicted before, and resident again
    :param first_resident: resident for the first time, as far as the daemon knows
    :param refaulted_own: how many of the refaulted pages the daemon had evicted
    """

    evicted_by_vm: Gfns
    refaulted: Gfns
    first_resident: Gfns
    refaulted_own: int

    @property
    def became_resident(self) -> Gfns:
        """All pages that became resident."""
        return np.union1d(self.refaulted, self.first_resident)


class VmPages:
    """Masks over the pages ``[0, n_pages)`` of one VM."""

    def __init__(self, memory: MemoryMap) -> None:
        self.n_pages = memory.gfn_end
        #: In a memslot and not pinned.
        self.movable: Mask = np.zeros(self.n_pages, dtype=bool)
        for memslot in memory.memslots:
            self.movable[memslot.gfn_start : memslot.gfn_start + memslot.n_pages] = True
        for pinned in memory.pinned:
            self.movable[pinned.gfn_start : pinned.gfn_start + pinned.n_pages] = False
        #: All pages of the VM, pinned ones included.
        self.n_memory = sum(memslot.n_pages for memslot in memory.memslots)
        self.n_pinned = sum(pinned.n_pages for pinned in memory.pinned)
        self.resident: Mask = np.zeros(self.n_pages, dtype=bool)
        self._has_baseline = False
        self._evicted: Mask = np.zeros(self.n_pages, dtype=bool)
        self._evicted_own: Mask = np.zeros(self.n_pages, dtype=bool)
        self._dry_evicted: Mask | None = None
        #: Young in the last window, and in the window before it.
        self._young = self._young_before = self._evicted

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
        """Resident pages that were young in one of the last two windows, and pinned pages."""
        working = (self._young | self._young_before) & self.resident & self.movable
        return int(np.count_nonzero(working)) + self.n_pinned

    def update(self, resident: Mask, young: Mask) -> ResidencyChanges:
        """Store which pages are resident and young now; return what changed."""
        self._young, self._young_before = young, self._young
        now = resident.copy()
        if self._dry_evicted is not None:
            self._dry_evicted &= ~young
            now &= ~self._dry_evicted
        before, self.resident = self.resident, now
        if not self._has_baseline:
            self._has_baseline = True
            nothing = np.empty(0, dtype=np.int64)
            return ResidencyChanges(nothing, nothing, nothing, 0)
        evicted, became_resident = before & ~now, now & ~before
        self._evicted |= evicted
        refaulted, first = became_resident & self._evicted, became_resident & ~self._evicted
        refaulted_own = int(np.count_nonzero(refaulted & self._evicted_own))
        self._evicted &= ~now
        self._evicted_own &= ~now
        return ResidencyChanges(
            np.flatnonzero(evicted), np.flatnonzero(refaulted), np.flatnonzero(first), refaulted_own
        )

    def note_evicted(self, gfns: Gfns, dry: bool = False) -> None:
        """Mark pages that the daemon evicted, or would have evicted in a dry run."""
        self.resident[gfns] = False
        self._evicted[gfns] = self._evicted_own[gfns] = True
        if dry:
            if self._dry_evicted is None:
                self._dry_evicted = np.zeros(self.n_pages, dtype=bool)
            self._dry_evicted[gfns] = True
