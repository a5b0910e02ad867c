"""guestpt: the accessed bits in the guest's own page tables.

The VMM laid the tables out in guest memory; the processor, or a KVM that shadows
them, sets accessed and dirty bits there, and the tdp walker harvests them in
place. Clearing a bit is not enough: a translation that is still cached sets
nothing. Calibration determines how to re-arm (:mod:`kvmhost.trackers.calibration`).

Staleness: a touch between the clearing of a bit and its re-arming is not seen.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from kvmhost import engine as engines
from kvmhost.bitmap import Words, YoungBitmap, clear_words, n_words, place_words, sub_words
from kvmhost.engine.base import Engine, RearmKind
from kvmhost.errors import CapabilityError
from kvmhost.memory.guest import GuestMemory, pieces
from kvmhost.mmu.tdp import LiveTable
from kvmhost.trackers.base import Support, TrackedVm, TrackerInfo
from kvmhost.trackers.calibration import Calibration, calibrate
from kvmhost.units import PAGE_BYTES
from kvmhost.vm.checks import check_range
from kvmhost.vm.names import EngineName

__all__ = ["GuestptTracker"]


class GuestptTracker:
    """Walks the live tables of a tiny guest.

    :param tables_gpa: root of the guest's tables
    :param calibration: what makes a cleared bit set again, see
        :func:`~kvmhost.trackers.calibration.calibrate`
    :ivar provenance: where the bits come from on this host, with the evidence
    """

    name: ClassVar[str] = "guestpt"
    info: ClassVar[TrackerInfo] = TrackerInfo(
        sees=("reads", "writes"),
        granularity_bytes=PAGE_BYTES,
        provenance="accessed bit of the leaf entry in the guest's own page table",
        guest_cost="one fault a re-armed page where KVM shadows, a TLB miss elsewhere",
        staleness="a touch between the clearing of a bit and its re-arming is not seen; "
        "a page that was cleared and not re-armed may read as old for ever",
    )

    def __init__(
        self, memory: GuestMemory, engine: Engine, tables_gpa: int, calibration: Calibration
    ) -> None:
        self._memory, self._engine = memory, engine
        self.rearm_kind = calibration.rearm
        self._evidence = str(calibration)
        self.provenance = f"{self.info.provenance}; {self._evidence}"
        self.table_format = "npt"
        self.table = LiveTable.of_guest(memory, tables_gpa)
        # Cleared and not re-armed yet, by region: such a page may still be cached.
        self._stale = {r.gfn: np.zeros(n_words(r.n_pages), dtype=np.uint64) for r in memory.regions}

    @classmethod
    def for_vm(cls, vm: TrackedVm) -> GuestptTracker:
        """Make a tracker for a VM, re-arming as calibrated; it is not started yet.

        :raises CapabilityError: if the guest builds its own tables, or re-arming has no effect
        """
        if vm.tables_gpa is None:
            raise CapabilityError(
                "tracker guestpt",
                "a guest that keeps the VMM's page tables",
                "a guest that makes its own",
                "use pagemap or idle",
            )
        return cls(vm.memory, vm.engine, vm.tables_gpa, calibrate(vm.engine))

    @classmethod
    def probe(cls, engine: EngineName = "auto") -> Support:
        """Calibrate on an engine and report how re-arming works there."""
        try:
            chosen = engines.choose(engine)
            try:
                found = calibrate(chosen)
            finally:
                chosen.close()
        except CapabilityError as error:
            return Support(False, str(error))
        return Support(True, f"engine {chosen.name}, re-arm by {found.rearm.value}: {found}")

    def start(self) -> None:
        """Clear and re-arm everything."""
        self.harvest(0, self._memory.gfn_end)
        self.rearm(0, self._memory.gfn_end)

    def harvest(
        self, gfn_start: int, n_pages: int, clear: bool = True, mask: Words | None = None
    ) -> YoungBitmap:
        """Test, or test and clear, the accessed bits of a range; see the protocol.

        Lockless: vCPUs keep running.
        """
        check_range(gfn_start, n_pages, self._memory.gfn_end)
        bitmap = self.table.harvest(gfn_start, n_pages, clear, mask)
        if clear and self.rearm_kind is not RearmKind.NONE:
            words = bitmap.words if mask is None else bitmap.words & mask
            self._note_stale(gfn_start, n_pages, words)
        provenance = dataclasses.replace(
            bitmap.provenance, tracker=self.name, evidence=self._evidence
        )
        return dataclasses.replace(bitmap, provenance=provenance)

    def rearm(self, gfn_start: int, n_pages: int, young: YoungBitmap | None = None) -> None:
        """Re-arm pages of a range; see the protocol.

        Only pages that were cleared are re-armed, unless the whole range is requested:
        zapping others would cost the guest a fault without benefit.
        """
        check_range(gfn_start, n_pages, self._memory.gfn_end)
        if self.rearm_kind is RearmKind.TLB_FLUSH:
            self._engine.flush_tlbs()
        for region, start, count in pieces(self._memory.regions, gfn_start, n_pages):
            first = start - region.gfn
            stale = self._stale[region.gfn]
            due = sub_words(stale, region.n_pages, first, count).copy()
            if self.rearm_kind is RearmKind.ZAP:
                words = None if young is None else due | _young_in(young, start, count)
                region.zap(start, count, words)
            clear_words(stale, first, due)

    def stop(self) -> None:
        """Release the walker. Idempotent."""
        self.table.close()

    def _note_stale(self, gfn_start: int, n_pages: int, words: Words) -> None:
        for region, start, count in pieces(self._memory.regions, gfn_start, n_pages):
            part = sub_words(words, n_pages, start - gfn_start, count)
            place_words(self._stale[region.gfn], start - region.gfn, part)


def _young_in(young: YoungBitmap, start: int, count: int) -> Words:
    """Return bits of [start, start + count) in a bitmap that may cover another range."""
    words = np.zeros(n_words(count), dtype=np.uint64)
    low = max(start, young.gfn_start)
    high = min(start + count, young.gfn_start + young.n_pages)
    if low < high:
        part = sub_words(young.words, young.n_pages, low - young.gfn_start, high - low)
        place_words(words, low - start, part)
    return words
