"""dirty: which pages were written, from KVM's dirty log or its dirty rings.

The memslots log dirty pages while the tracker runs. Protection is manual
(``KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2``): reading the log changes nothing, and
clearing affects exactly the requested pages and write-protects them again, so
that no re-arming is needed.

A machine made with ``dirty_ring_entries`` has one ring per vCPU instead. Collecting
it removes all written pages, and KVM protects them again at once; pages that were
not requested or not cleared are kept in a bitmap, so both forms report the same.

Reads are not detected. Besides the guest's own stores, the log has KVM's writes on
its behalf: a KVM that shadows sets accessed and dirty bits in the guest's tables,
so the pages of live tables appear as written.
"""

from __future__ import annotations

import contextlib
import time
import typing
from typing import ClassVar

import numpy as np

from kvmhost._ffi import check, ffi, lib
from kvmhost.bitmap import Provenance, Words, YoungBitmap, n_words
from kvmhost.errors import CapabilityError, IoctlError, StateError
from kvmhost.kvm.caps import Cap
from kvmhost.memory.guest import GuestMemory, Region
from kvmhost.trackers.base import (
    Support,
    TrackedVm,
    TrackerInfo,
    harvest_pieces,
    need_started,
)
from kvmhost.units import PAGE_BYTES
from kvmhost.vm.names import EngineName

if typing.TYPE_CHECKING:
    from kvmhost.engine.base import Engine
    from kvmhost.engine.kvm import KvmEngine
from kvmhost.vm.checks import check_range

__all__ = ["DirtyTracker"]

_PROBE_ENTRIES = 4096


class DirtyTracker:
    """Reads KVM's dirty log, or the dirty rings of a machine that has them.

    :raises CapabilityError: on another engine than kvm, or without manual protection
    """

    name: ClassVar[str] = "dirty"
    info: ClassVar[TrackerInfo] = TrackerInfo(
        sees=("writes",),
        granularity_bytes=PAGE_BYTES,
        provenance="KVM's dirty log of the memslots, or the vCPUs' dirty rings",
        guest_cost="one write fault a cleared page",
        staleness="none: a write is in the window that ends with the clearing after it; with rings "
        "on a CPU that logs by itself, up to 512 pages a vCPU show after its next exit",
    )

    def __init__(self, memory: GuestMemory, engine: Engine) -> None:
        self._memory = memory
        self._engine = _kvm_engine(engine)
        self.table_format = "dirty-log" if self._engine.rings is None else "dirty-ring"
        if self._engine.rings is None:
            _protect_by_hand(self._engine)
        self._slots = {region.gfn: i for i, region in enumerate(self._memory.regions)}
        self._room: Words | None = None
        self._last_ns = 0
        self._started = False

    @classmethod
    def for_vm(cls, vm: TrackedVm) -> DirtyTracker:
        """Make a tracker for a VM; it is not started yet."""
        return cls(vm.memory, vm.engine)

    @classmethod
    def probe(cls, engine: EngineName = "auto") -> Support:
        """Enable manual protection in a temporary VM."""
        from kvmhost import engine as engines

        try:
            chosen = engines.choose(engine)
            try:
                _protect_by_hand(_kvm_engine(chosen))
            finally:
                chosen.close()
        except CapabilityError as error:
            return Support(False, str(error))
        return Support(True, f"dirty log with manual protection; {_probe_ring()}")

    def start(self) -> None:
        """Switch logging on: no page is dirty, every page is write-protected."""
        if self._engine.rings is not None:
            self._engine.rings.forget()
        self._started = True
        self._engine.log_dirty_pages(True)
        self._last_ns = time.monotonic_ns()

    def harvest(
        self, gfn_start: int, n_pages: int, clear: bool = True, mask: Words | None = None
    ) -> YoungBitmap:
        """Return the pages that were written, and clear them with ``clear``; see the protocol."""
        need_started(self.name, self._started)

        def piece(region: Region, start: int, count: int, wanted: Words | None) -> Words:
            return self._harvest_region(region, start - region.gfn, count, clear, wanted)

        whole = harvest_pieces(self._memory, gfn_start, n_pages, mask, piece)
        window_start, self._last_ns = self._last_ns, time.monotonic_ns()
        provenance = Provenance(self.name, self.table_format, window_start, self._last_ns)
        return YoungBitmap(gfn_start, n_pages, whole, None, provenance)

    def rearm(self, gfn_start: int, n_pages: int, young: YoungBitmap | None = None) -> None:
        """Nothing: a cleared page is armed. Pages that were not cleared stay as they are."""
        check_range(gfn_start, n_pages, self._memory.gfn_end)

    def stop(self) -> None:
        """Switch logging off; pages become writable again at their next fault. Idempotent."""
        if self._started:
            self._started = False
            # A closed machine has no logging to disable.
            with contextlib.suppress(StateError):
                self._engine.log_dirty_pages(False)
                if self._engine.rings is not None:
                    self._engine.rings.forget()

    def _harvest_region(
        self, region: Region, first: int, count: int, clear: bool, wanted: Words | None
    ) -> Words:
        """Return the bits of pages ``[first, first + count)`` of a region."""
        slot = self._slots[region.gfn]
        if self._engine.rings is not None:
            words = np.zeros(n_words(count), dtype=np.uint64)
            self._engine.rings.harvest(slot, first, count, clear, wanted, words)
            return words
        words = np.empty(n_words(count), dtype=np.uint64)
        room = ffi.NULL
        if count != region.n_pages or wanted is not None:
            room = ffi.from_buffer("uint64_t[]", self._room_for(region.n_pages))
        # SAFETY: the arrays live until the call returns.
        out = ffi.from_buffer("uint64_t[]", words)
        chosen = ffi.NULL if wanted is None else ffi.from_buffer("uint64_t[]", wanted)
        result = lib.kh_dirty_harvest(
            self._engine.vm.fd, slot, region.n_pages, first, count, clear, chosen, out, room
        )
        if result < 0:
            check(result, "KVM_GET_DIRTY_LOG", slot=slot, first=first, pages=count)
        return words

    def _room_for(self, slot_pages: int) -> Words:
        """Return words for the log of a whole slot, kept from harvest to harvest."""
        if self._room is None or self._room.size < n_words(slot_pages):
            self._room = np.empty(n_words(slot_pages), dtype=np.uint64)
        return self._room


def _kvm_engine(engine: Engine) -> KvmEngine:
    if engine.name != "kvm":
        raise CapabilityError(
            "tracker dirty", "KVM's dirty log", f"engine {engine.name}", "use --engine kvm"
        )
    return typing.cast("KvmEngine", engine)


def _probe_ring() -> str:
    """Enable and map a dirty ring in a temporary VM; return the result as text."""
    from kvmhost.engine.kvm import KvmEngine

    engine = KvmEngine()
    try:
        engine.enable_dirty_ring(_PROBE_ENTRIES)
        assert engine.rings is not None
        with engine.vm.create_vcpu(0) as vcpu:
            engine.rings.add_vcpu(vcpu.fd)
    except (CapabilityError, IoctlError) as error:
        return f"no dirty ring: {error}"
    finally:
        engine.close()
    return "a dirty ring a vCPU with run --dirty-ring ENTRIES"


def _protect_by_hand(engine: KvmEngine) -> None:
    """Enable manual protection. Idempotent.

    Not ``KVM_DIRTY_LOG_INITIALLY_SET``: the first window would begin with all pages dirty.
    """
    try:
        engine.vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    except IoctlError as error:
        raise CapabilityError(
            "tracker dirty",
            "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
            str(error),
            "use Linux 5.2 or newer",
        ) from error
