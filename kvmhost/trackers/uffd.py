"""uffd: each first touch of a page is a message that userspace answers.

The guest mapping is registered for minor faults (the memfd holds the page) and
missing ones (the page was never touched). A C thread notes the page, maps it and
wakes the vCPU: the software access-flag model, with the order and the time of the
first touches as a by-product. Clearing zaps the page, so that its next touch is a
message again.

This is expensive: a guest thread sleeps for every first touch of a window. The tracker
needs exclusive use of the VM's userfaultfd: it cannot start while the pager is armed, and
the pager cannot be armed while it runs. Both raise an error.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvmhost._ffi import check, ffi, lib
from kvmhost.bitmap import Provenance, Words, YoungBitmap, n_words
from kvmhost.errors import CapabilityError, KvmHostError
from kvmhost.memory.guest import GuestMemory, Region
from kvmhost.pager.userfault import Userfault
from kvmhost.trackers.base import (
    Support,
    TrackedVm,
    TrackerInfo,
    harvest_pieces,
    need_started,
)
from kvmhost.units import PAGE_BYTES
from kvmhost.vm.checks import check_range
from kvmhost.vm.names import EngineName

__all__ = ["AccessOrder", "UffdTracker"]

_READER = "uffd tracker"
#: Default size of the log: one entry of 16 bytes per this many pages, 0.05 % of memory.
_PAGES_PER_ENTRY = 8


@dataclasses.dataclass(frozen=True)
class AccessOrder:
    """First touches in the order in which they were served; all arrays have one length.

    :param gfns: ``int64``; a page comes again where a harvest cleared it in between
    :param times_ns: ``CLOCK_MONOTONIC``, when the touch was served, ``uint64``
    :param writes: whether the first touch was a write, ``bool``
    :param dropped: first touches since the start that were dropped because the log was full
    """

    gfns: npt.NDArray[np.int64]
    times_ns: npt.NDArray[np.uint64]
    writes: npt.NDArray[np.bool_]
    dropped: int


class UffdTracker:
    """Serves first touches in a thread of its own.

    :param log_entries: first touches to keep until :meth:`take_order`; more are
        counted and dropped, without effect on the young bits. Default: one
        for 8 pages
    :raises CapabilityError: without userfaultfd or its minor faults
    """

    name: ClassVar[str] = "uffd"
    info: ClassVar[TrackerInfo] = TrackerInfo(
        sees=("reads", "writes", "order"),
        granularity_bytes=PAGE_BYTES,
        provenance="minor or missing fault on the guest mapping, delivered by userfaultfd",
        guest_cost="one fault a cleared page, answered by another thread",
        staleness="none: clearing and zapping a page are one step for the thread that maps it",
    )

    def __init__(
        self, memory: GuestMemory, userfault: Userfault, log_entries: int | None = None
    ) -> None:
        self._memory, self._userfault = memory, userfault
        self._regions = memory.regions
        self._started = False
        _need_minor_faults(self._userfault)
        self.table_format = "userfault"
        entries = self._memory.n_pages // _PAGES_PER_ENTRY if log_entries is None else log_entries
        core = lib.kh_minor_new(self._userfault.fd, entries)
        if core == ffi.NULL:
            raise KvmHostError("out of memory for the uffd tracker")
        # SAFETY: owned here and freed with this object, so that a call after stop() is
        # harmless; freeing ends the thread if stop() did not.
        self._core = ffi.gc(core, lib.kh_minor_free)
        for region in self._memory.regions:
            result = lib.kh_minor_add_region(self._core, region.guest_address, region.n_pages)
            check(result, "kh_minor_add_region", gpa=region.gpa)
        self._log_entries = entries
        self._last_ns = 0

    @classmethod
    def for_vm(cls, vm: TrackedVm) -> UffdTracker:
        """Make a tracker for a VM; it is not started yet."""
        return cls(vm.memory, vm.open_userfault())

    @classmethod
    def probe(cls, engine: EngineName = "auto") -> Support:
        """Open a userfaultfd and look for minor faults on shared memory."""
        try:
            userfault = Userfault()
        except CapabilityError as error:
            return Support(False, str(error))
        try:
            _need_minor_faults(userfault)
        except CapabilityError as error:
            return Support(False, str(error))
        finally:
            userfault.close()
        return Support(True, "minor faults on shared memory; not while the pager is armed")

    def start(self) -> None:
        """Claim the userfaultfd, and zap all pages.

        :raises CapabilityError: if the pager is armed
        :raises IoctlError: if a mapping cannot be registered
        """
        self._userfault.claim(_READER)
        check(lib.kh_minor_start(self._core), "UFFDIO_REGISTER", mode="missing, minor")
        self._started = True
        self._last_ns = time.monotonic_ns()

    def harvest(
        self, gfn_start: int, n_pages: int, clear: bool = True, mask: Words | None = None
    ) -> YoungBitmap:
        """Return the pages that were touched, and zap them with ``clear``; see the protocol."""
        need_started(self.name, self._started)

        def piece(region: Region, start: int, count: int, wanted: Words | None) -> Words:
            words = np.zeros(n_words(count), dtype=np.uint64)
            # SAFETY: both arrays live until the call returns.
            out = ffi.from_buffer("uint64_t[]", words, require_writable=True)
            chosen = ffi.NULL if wanted is None else ffi.from_buffer("uint64_t[]", wanted)
            index = self._memory.index_of_gfn(start)
            check(
                lib.kh_minor_harvest(self._core, index, count, int(clear), chosen, out),
                "madvise",
                gfn=start,
                pages=count,
            )
            return words

        whole = harvest_pieces(self._memory, gfn_start, n_pages, mask, piece)
        window_start, self._last_ns = self._last_ns, time.monotonic_ns()
        provenance = Provenance(self.name, self.table_format, window_start, self._last_ns)
        return YoungBitmap(gfn_start, n_pages, whole, None, provenance)

    def rearm(self, gfn_start: int, n_pages: int, young: YoungBitmap | None = None) -> None:
        """Nothing: a cleared page is armed. Pages that were not cleared stay as they are."""
        check_range(gfn_start, n_pages, self._memory.gfn_end)

    def take_order(self) -> AccessOrder:
        """Return the log of first touches, oldest first, and empty it."""
        kind = np.dtype([("ns", "u8"), ("page", "u4"), ("is_write", "u4")])
        log = np.zeros(self._log_entries, dtype=kind)
        used = 0
        if self._log_entries:
            # SAFETY: log lives until the call returns; struct kh_access has this layout.
            out = ffi.from_buffer("struct kh_access[]", log, require_writable=True)
            used = lib.kh_minor_take(self._core, out, self._log_entries)
        log = log[:used]
        return AccessOrder(
            self._gfns_of(log["page"].astype(np.int64)),
            log["ns"].astype(np.uint64),
            log["is_write"].astype(bool),
            self.counters()["dropped"],
        )

    def counters(self) -> dict[str, int]:
        """Return messages, first touches, zero-filled pages, dropped entries and errors."""
        raw: Any = ffi.new("struct kh_minor_counts *")
        lib.kh_minor_counts(self._core, raw)
        return {name: int(getattr(raw, name)) for name, _ in ffi.typeof(raw[0]).fields}

    def stop(self) -> None:
        """Unregister, end the thread, release the userfaultfd. Idempotent.

        Fault-around stays disabled where another tracker has disabled it meanwhile.
        """
        lib.kh_minor_stop(self._core)
        self._started = False
        self._userfault.release(_READER, self._regions)

    def _gfns_of(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        firsts = np.cumsum([0] + [region.n_pages for region in self._memory.regions])
        which = np.searchsorted(firsts, pages, side="right") - 1
        starts = np.array([region.gfn for region in self._memory.regions])
        gfns: npt.NDArray[np.int64] = pages - firsts[which] + starts[which]
        return gfns


def _need_minor_faults(userfault: Userfault) -> None:
    if not userfault.minor_faults:
        raise CapabilityError(
            "userfaultfd",
            "minor faults on shmem",
            f"features {userfault.features:#x}",
            "use Linux 5.14 or newer, or another tracker",
        )
