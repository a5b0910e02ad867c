"""pagemap: zap the guest mapping, later find which host PTEs are present again.

The data stays in the memfd, so zapping loses nothing; the next touch by the
guest, of any kind and through any page tables, sets the host PTE again.
``PAGEMAP_SCAN`` (Linux 6.7) finds those; on older kernels ``/proc/self/pagemap``
is read. Clearing is the zap itself, so no re-arming is needed.

The kernel maps up to 64 KiB around a read fault. Registering the mapping with
userfaultfd for write-protection turns that off; without userfaultfd, every
bit is reported as coarse. So is every bit that comes from a huge host page, which is
cleared as a whole if any of its pages is; plain reads cannot detect those.

Staleness: a touch between the scan and the zap of the same page is not seen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from kvmhost._ffi import check, ffi, lib
from kvmhost.bitmap import Provenance, Words, YoungBitmap, n_words
from kvmhost.errors import CapabilityError
from kvmhost.memory.guest import GuestMemory, Region, pieces
from kvmhost.pager.userfault import Userfault
from kvmhost.pager.userfault import probe as probe_userfault
from kvmhost.trackers.base import (
    Support,
    TrackedVm,
    TrackerInfo,
    add_piece,
    harvest_pieces,
)
from kvmhost.trackers.pagescan import PageStates, new_scanner, page_states, scans
from kvmhost.units import PAGE_BYTES
from kvmhost.vm.checks import check_range
from kvmhost.vm.names import EngineName

__all__ = ["PagemapTracker"]


class PagemapTracker:
    """Finds the touched pages in the host's page table.

    :param open_userfault: opens the VM's userfaultfd, which makes bits exact at 4 KiB
    :raises CapabilityError: if /proc/self/pagemap cannot be read
    """

    name: ClassVar[str] = "pagemap"
    info: ClassVar[TrackerInfo] = TrackerInfo(
        sees=("reads", "writes"),
        granularity_bytes=PAGE_BYTES,
        provenance="host PTE of the guest mapping, present again after a zap",
        guest_cost="one host fault a cleared page",
        staleness="a touch between the scan and the zap of the same page is not seen",
    )

    def __init__(self, memory: GuestMemory, open_userfault: Callable[[], Userfault]) -> None:
        self._memory, self._open_userfault = memory, open_userfault
        self.table_format = "host"
        self.coarse = False
        self._spare: Words | None = None
        self._last_ns = 0
        try:
            self._fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CapabilityError(
                "tracker pagemap", "/proc/self/pagemap", error.strerror or "", "mount /proc"
            ) from error
        self.scans = scans(self._fd)
        self._scanner = new_scanner(self._memory.n_pages)

    @classmethod
    def for_vm(cls, vm: TrackedVm) -> PagemapTracker:
        """Make a tracker for a VM; it is not started yet."""
        return cls(vm.memory, vm.open_userfault)

    @classmethod
    def probe(cls, engine: EngineName = "auto") -> Support:
        """Scan a mapping of one page; report the method and its granularity."""
        region = Region(0, PAGE_BYTES)
        try:
            fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            return Support(False, f"/proc/self/pagemap: {error.strerror}")
        finally:
            region.close()
        os.close(fd)
        problem = probe_userfault()
        fine = "4 KiB" if problem is None else f"64 KiB ({problem})"
        return Support(True, f"granularity {fine}")

    def start(self) -> None:
        """Turn fault-around off and zap everything."""
        try:
            userfault = self._open_userfault()
            for region in self._memory.regions:
                userfault.silence_fault_around(region)
        except CapabilityError:
            self.coarse = True
        for region in self._memory.regions:
            region.zap(region.gfn, region.n_pages)
        self._last_ns = time.monotonic_ns()

    def harvest(
        self, gfn_start: int, n_pages: int, clear: bool = True, mask: Words | None = None
    ) -> YoungBitmap:
        """Return the pages present again, and zap them with ``clear``; see the protocol."""

        coarse: Words | None = None

        def piece(region: Region, start: int, count: int, wanted: Words | None) -> Words:
            nonlocal coarse
            address = region.guest_address + (start - region.gfn) * PAGE_BYTES
            young, huge = np.zeros(n_words(count), dtype=np.uint64), self._clean_words(count)
            found = self._harvest_mapping(address, count, clear, wanted, young, huge)
            if found & lib.KH_PAGES_HUGE:
                self._spare = None  # handed out, or not clean
            if self.coarse or found & lib.KH_PAGES_HUGE:
                coarse = add_piece(coarse, n_pages, start - gfn_start, count,
                                   young if self.coarse else huge)  # fmt: skip
            return young

        whole = harvest_pieces(self._memory, gfn_start, n_pages, mask, piece)
        window_start, self._last_ns = self._last_ns, time.monotonic_ns()
        provenance = Provenance(self.name, self.table_format, window_start, self._last_ns)
        return YoungBitmap(gfn_start, n_pages, whole, coarse, provenance)

    def rearm(self, gfn_start: int, n_pages: int, young: YoungBitmap | None = None) -> None:
        """Nothing: a cleared page is armed. Pages that were not cleared stay as they are."""
        check_range(gfn_start, n_pages, self._memory.gfn_end)

    def states(self, gfn_start: int, n_pages: int) -> PageStates:
        """Return which pages of a range are mapped, swapped or absent; changes nothing."""
        check_range(gfn_start, n_pages, self._memory.gfn_end)
        found = np.zeros((3, n_pages), dtype=bool)
        for region, start, count in pieces(self._memory.regions, gfn_start, n_pages):
            address = region.guest_address + (start - region.gfn) * PAGE_BYTES
            bits = page_states(self._fd, address, count, self._scanner if self.scans else None)
            here = slice(start - gfn_start, start - gfn_start + count)
            found[:, here] = bits.present, bits.huge, bits.swapped
        return PageStates(*found)

    def stop(self) -> None:
        """Close pagemap. Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _clean_words(self, n_pages: int) -> Words:
        """Return zeros for the rare huge pages: new memory would cost more than the scan."""
        if self._spare is None or self._spare.size < n_words(n_pages):
            self._spare = np.zeros(n_words(n_pages), dtype=np.uint64)
        return self._spare[: n_words(n_pages)]

    def _harvest_mapping(
        self,
        address: int,
        count: int,
        clear: bool,
        wanted: Words | None,
        young: Words,
        huge: Words,
    ) -> int:
        # SAFETY: the arrays live until the call returns.
        chosen = ffi.NULL if wanted is None else ffi.from_buffer("uint64_t[]", wanted)
        out, coarse = (ffi.from_buffer("uint64_t[]", words) for words in (young, huge))
        scanner = self._scanner if self.scans else ffi.NULL
        result: int = lib.kh_scan_harvest(
            scanner, self._fd, address, count, clear, chosen, out, coarse
        )
        if result >= 0:
            return result
        request = "PAGEMAP_SCAN" if self.scans else "pread(pagemap)"
        return check(result, request, start=address, pages=count)
