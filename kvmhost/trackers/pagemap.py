"""pagemap: zap the guest mapping, later ask which host PTEs came back.

The data stays in the memfd, so zapping loses nothing; the next touch by the
guest, of whatever kind and through whatever tables, puts the host PTE back.
``PAGEMAP_SCAN`` (Linux 6.7) finds those; on older kernels ``/proc/self/pagemap``
is read. Clearing is the zap itself, so there is nothing left to re-arm.

The kernel maps up to 64 KiB around a read fault. Registering the mapping with
userfaultfd for write-protection turns that off; where it cannot be had, every
bit is reported as coarse.

Staleness: a touch between the scan and the zap of the same page is not seen.
"""

from __future__ import annotations

import errno
import os
import time
import typing
from typing import ClassVar

import numpy as np

from kvmhost._ffi import check, ffi, lib
from kvmhost.bitmap import Provenance, Words, YoungBitmap, n_words
from kvmhost.errors import CapabilityError
from kvmhost.memory.guest import Region
from kvmhost.trackers.base import Support, TrackerInfo, check_range, harvest_pieces

if typing.TYPE_CHECKING:
    from kvmhost.machine import Machine

__all__ = ["PLAIN_PAGEMAP_ENV", "PagemapTracker"]

#: Set to a non-empty value to read pagemap as kernels before 6.7 have it.
PLAIN_PAGEMAP_ENV = "KVMHOST_PLAIN_PAGEMAP"


class PagemapTracker:
    """Asks the host's page table what the guest touched.

    :raises CapabilityError: if /proc/self/pagemap cannot be read
    """

    name: ClassVar[str] = "pagemap"
    info: ClassVar[TrackerInfo] = TrackerInfo(
        sees=("reads", "writes"),
        granularity_bytes=4096,
        provenance="host PTE of the guest mapping, present again after a zap",
        guest_cost="one host fault a cleared page",
        staleness="a touch between the scan and the zap of the same page is not seen",
    )

    def __init__(self, machine: Machine) -> None:
        self._machine, self._memory = machine, machine.memory
        self.table_format = "host"
        self.coarse = False
        self._last_ns = 0
        try:
            self._fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CapabilityError(
                "pagemap", "/proc/self/pagemap", error.strerror or "", "mount /proc"
            ) from error
        self.scans = not os.environ.get(PLAIN_PAGEMAP_ENV) and self._try_scan()

    @classmethod
    def probe(cls, engine: str = "auto") -> Support:
        """Scan the mapping of a page of its own; tell which way and how fine."""
        from kvmhost.memory.guest import Region
        from kvmhost.pager.userfault import probe as probe_userfault

        region = Region(0, 4096)
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
            for region in self._memory.regions:
                self._machine.userfault.silence_fault_around(region)
        except CapabilityError:
            self.coarse = True
        for region in self._memory.regions:
            self._zap(region.guest_address, region.n_pages, None)
        self._last_ns = time.monotonic_ns()

    def harvest(
        self, gfn_start: int, n_pages: int, clear: bool = True, mask: Words | None = None
    ) -> YoungBitmap:
        """Find the pages that came back, and zap them with ``clear``; see the protocol."""

        def piece(region: Region, start: int, count: int, wanted: Words | None) -> Words:
            address = region.guest_address + (start - region.gfn) * 4096
            words = np.zeros(n_words(count), dtype=np.uint64)
            self._present(address, count, words)
            if clear:
                self._zap(address, count, words if wanted is None else words & wanted)
            return words

        whole = harvest_pieces(self._memory, gfn_start, n_pages, mask, piece)
        window_start, self._last_ns = self._last_ns, time.monotonic_ns()
        provenance = Provenance(self.name, self.table_format, window_start, self._last_ns)
        coarse = whole.copy() if self.coarse else None
        return YoungBitmap(gfn_start, n_pages, whole, coarse, provenance)

    def rearm(self, gfn_start: int, n_pages: int, young: YoungBitmap | None = None) -> None:
        """Nothing: a cleared page is armed. Pages that were not cleared stay as they are."""
        check_range(gfn_start, n_pages)

    def stop(self) -> None:
        """Close pagemap. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _try_scan(self) -> bool:
        region = self._memory.regions[0]
        words = np.zeros(1, dtype=np.uint64)
        pointer = ffi.from_buffer("uint64_t[]", words)
        result = lib.kh_pagemap_scan(self._fd, region.guest_address, 1, pointer)
        if result in (-errno.ENOTTY, -errno.EINVAL):
            return False
        check(result, "PAGEMAP_SCAN", start=region.guest_address)
        return True

    def _present(self, address: int, n_pages: int, words: Words) -> None:
        ask = lib.kh_pagemap_scan if self.scans else lib.kh_pagemap_read
        check(
            ask(self._fd, address, n_pages, ffi.from_buffer("uint64_t[]", words)),
            "PAGEMAP_SCAN" if self.scans else "pread(pagemap)",
            start=address,
            pages=n_pages,
        )

    @staticmethod
    def _zap(address: int, n_pages: int, words: Words | None) -> None:
        pointer = ffi.NULL if words is None else ffi.from_buffer("uint64_t[]", words)
        check(lib.kh_zap(address, n_pages, pointer, 0), "madvise", start=address, pages=n_pages)
