"""idle: the kernel's idle page tracking, by pfn.

``/sys/kernel/mm/page_idle/bitmap`` has a bit for every pfn. Writing 1 makes a page
idle: the kernel clears the accessed bits of all its mappings, through the MMU
notifiers KVM's too. A page that reads as not idle was touched since. The pfn of
a guest page is in ``/proc/self/pagemap``; the bitmap has 64 bits per word.

The bit describes the page, not the guest's accesses: an access by the VMM through the
alias counts as well, as does one by any process that maps the memory. Only the
first page of a huge one has a bit, so all its pages are reported coarse. A page
whose pfn changes during the look-up is looked up again; one that keeps changing is
reported young and coarse. Pages that are on no LRU list cannot be made idle
and read as young: new pages for a short time, and pages of hugetlb always.

Source: Documentation/admin-guide/mm/idle_page_tracking.rst and mm/page_idle.c, Linux v6.12.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from kvmhost._ffi import check, ffi, lib
from kvmhost.bitmap import Provenance, Words, YoungBitmap, pack, unpack
from kvmhost.errors import CapabilityError, IoctlError
from kvmhost.memory.guest import GfnRange, Region, pieces
from kvmhost.trackers.base import Support, TrackedVm, TrackerInfo
from kvmhost.units import PAGE_BYTES
from kvmhost.vm.checks import check_mask, check_range
from kvmhost.vm.names import EngineName

__all__ = ["IDLE_BITMAP", "IdleFiles", "IdleTracker", "PageFiles"]

IDLE_BITMAP = Path("/sys/kernel/mm/page_idle/bitmap")
_CHUNK_PAGES = 8192
#: Maximum number of look-ups of a page whose pfn changes.
_TRIES = 4
#: include/uapi/linux/kernel-page-flags.h
_KPF_COMPOUND_HEAD, _KPF_COMPOUND_TAIL = np.uint64(1 << 15), np.uint64(1 << 16)
#: Huge pages lie at multiples of their size, and none that matters here is above 2 MiB.
_BLOCK_SHIFT = np.uint64(9)

Pfns = npt.NDArray[np.uint64]
Bits = npt.NDArray[np.bool_]


class PageFiles(Protocol):
    """The kernel files that the tracker uses: tests replace them."""

    def pfns(self, address: int, n_pages: int) -> Pfns:
        """Return the pfn of each page of a mapping; 0: not present."""

    def read_idle(self, indexes: Pfns) -> Words:
        """Return words of the idle bitmap; bit ``i`` of word ``w`` is pfn ``64 * w + i``."""

    def write_idle(self, indexes: Pfns, words: Words) -> None:
        """Make the pfns idle whose bits are 1; those with 0 stay as they are."""

    def flags(self, pfns: Pfns) -> Words:
        """Return the ``KPF_*`` flags of ascending pfns."""

    def close(self) -> None:
        """Close. Idempotent."""


class IdleFiles:
    """The real files.

    :raises CapabilityError: if one of them cannot be opened, or pfns are hidden
    """

    def __init__(
        self,
        bitmap: Path = IDLE_BITMAP,
        pagemap: Path = Path("/proc/self/pagemap"),
        kpageflags: Path = Path("/proc/kpageflags"),
    ) -> None:
        self._fds: list[int] = []
        try:
            for path, mode in (
                (bitmap, os.O_RDWR),
                (pagemap, os.O_RDONLY),
                (kpageflags, os.O_RDONLY),
            ):
                self._fds.append(_open(path, mode | os.O_CLOEXEC))
        except CapabilityError:
            self.close()
            raise
        self._bitmap, self._pagemap, self._kpageflags = self._fds

    def pfns(self, address: int, n_pages: int) -> Pfns:
        """Return the pfn of each page of a mapping; 0: not present.

        :raises CapabilityError: if the kernel hides pfns
        """
        found = np.zeros(n_pages, dtype=np.uint64)
        out = ffi.from_buffer("uint64_t[]", found, require_writable=True)
        result = lib.kh_pagemap_pfns(self._pagemap, address, n_pages, out)
        if result == -errno.EPERM:
            raise CapabilityError(
                "tracker idle", "pfns in pagemap", "zeros", "run with CAP_SYS_ADMIN"
            )
        check(result, "pread(pagemap)", address=address, pages=n_pages)
        return found

    def read_idle(self, indexes: Pfns) -> Words:
        """Return words of the idle bitmap."""
        return self._read(self._bitmap, indexes, "pread(page_idle/bitmap)")

    def write_idle(self, indexes: Pfns, words: Words) -> None:
        """Make the pfns idle whose bits are 1."""
        # SAFETY: both arrays live until the call returns.
        where, what = (ffi.from_buffer("uint64_t[]", array) for array in (indexes, words))
        result = lib.kh_words_write(self._bitmap, where, indexes.size, what)
        check(result, "pwrite(page_idle/bitmap)", words=indexes.size)

    def flags(self, pfns: Pfns) -> Words:
        """Return the ``KPF_*`` flags of ascending pfns."""
        return self._read(self._kpageflags, pfns, "pread(kpageflags)")

    def close(self) -> None:
        """Close all files. Idempotent."""
        while self._fds:
            os.close(self._fds.pop())

    @staticmethod
    def _read(fd: int, indexes: Pfns, request: str) -> Words:
        words = np.zeros(indexes.size, dtype=np.uint64)
        # SAFETY: both arrays live until the call returns.
        where = ffi.from_buffer("uint64_t[]", indexes)
        out = ffi.from_buffer("uint64_t[]", words, require_writable=True)
        check(lib.kh_words_read(fd, where, indexes.size, out), request, words=indexes.size)
        return words


@dataclasses.dataclass(frozen=True)
class _Mapping:
    """A mapping of any process, as one run of pages from gfn 0."""

    guest_address: int
    n_pages: int
    gfn: int = 0


class IdleTracker:
    """Reads the kernel's idle flags.

    :param regions: runs of pages, as mapped by the process that the files belong to
    :raises CapabilityError: without CONFIG_IDLE_PAGE_TRACKING or CAP_SYS_ADMIN
    """

    name: ClassVar[str] = "idle"
    info: ClassVar[TrackerInfo] = TrackerInfo(
        sees=("reads", "writes"),
        granularity_bytes=PAGE_BYTES,
        provenance="idle flag of the page, which every mapping's accessed bits clear",
        guest_cost="none where the CPU sets accessed bits again by itself",
        staleness="a touch through a translation that the CPU has cached is not seen; a page "
        "that lost its host mapping since its touch reads as old; so may one that takes the "
        "place of a page that moves while it is being marked",
    )

    def __init__(self, regions: Sequence[GfnRange], files: PageFiles | None = None) -> None:
        self._regions = regions
        self._gfn_end = max(region.gfn + region.n_pages for region in regions)
        self._files = self.open_files() if files is None else files
        self.table_format = "page-idle"
        self._last_ns = 0

    @classmethod
    def for_vm(cls, vm: TrackedVm) -> IdleTracker:
        """Make a tracker for a VM; it is not started yet."""
        return cls(vm.memory.regions)

    @classmethod
    def on_mapping(cls, address: int, n_pages: int, files: PageFiles) -> IdleTracker:
        """Make a tracker for a mapping of the process of the files, with gfns from 0."""
        return cls([_Mapping(address, n_pages)], files)

    @staticmethod
    def open_files() -> PageFiles:
        """Open the kernel's files."""
        return IdleFiles()

    @classmethod
    def probe(cls, engine: EngineName = "auto") -> Support:
        """Open the files and look up a page of this process."""
        try:
            files = cls.open_files()
        except CapabilityError as error:
            return Support(False, str(error))
        region = Region(0, PAGE_BYTES)
        try:
            region.alias[0] = 1
            pfn = files.pfns(region.alias_address, 1)
            files.read_idle(pfn // np.uint64(64))
        except (CapabilityError, IoctlError) as error:
            return Support(False, str(error))
        finally:
            region.close()
            files.close()
        return Support(True, "idle flags by pfn; accesses by the VMM count as well")

    def start(self) -> None:
        """Make every page idle."""
        self.harvest(0, self._gfn_end)

    def harvest(
        self, gfn_start: int, n_pages: int, clear: bool = True, mask: Words | None = None
    ) -> YoungBitmap:
        """Return the pages that are not idle, and make them idle with ``clear``."""
        check_range(gfn_start, n_pages, self._gfn_end)
        check_mask(mask, n_pages)
        wanted = np.ones(n_pages, dtype=bool) if mask is None else unpack(mask, n_pages)
        young, coarse = np.zeros(n_pages, dtype=bool), np.zeros(n_pages, dtype=bool)
        for region, start, count in pieces(self._regions, gfn_start, n_pages):
            for first in range(start, start + count, _CHUNK_PAGES):
                n = min(_CHUNK_PAGES, start + count - first)
                here = slice(first - gfn_start, first - gfn_start + n)
                address = region.guest_address + (first - region.gfn) * PAGE_BYTES
                young[here], coarse[here] = self._chunk(address, wanted[here], clear)
        window_start, self._last_ns = self._last_ns, time.monotonic_ns()
        provenance = Provenance(self.name, self.table_format, window_start, self._last_ns)
        marked = pack(coarse) if coarse.any() else None
        return YoungBitmap(gfn_start, n_pages, pack(young), marked, provenance)

    def rearm(self, gfn_start: int, n_pages: int, young: YoungBitmap | None = None) -> None:
        """Nothing: a page that was made idle is armed as far as the kernel can."""
        check_range(gfn_start, n_pages, self._gfn_end)

    def stop(self) -> None:
        """Close the files. Idempotent."""
        self._files.close()

    def _chunk(self, address: int, wanted: Bits, clear: bool) -> tuple[Bits, Bits]:
        """Return which pages of a chunk are young, and of those which are coarse."""
        n_pages = wanted.size
        young, coarse = np.zeros(n_pages, dtype=bool), np.zeros(n_pages, dtype=bool)
        settled = np.zeros(n_pages, dtype=np.uint64)
        moving = np.ones(n_pages, dtype=bool)
        pfns = self._files.pfns(address, n_pages)
        for _ in range(_TRIES):
            heads, huge = self._heads(pfns)
            touched = (pfns != 0) & ~self._idle(heads)
            again = self._files.pfns(address, n_pages)
            still = moving & (again == pfns)
            young[still], coarse[still] = touched[still], (touched & huge)[still]
            settled[still] = heads[still]
            moving &= ~still
            if not moving.any():
                break
            pfns = again
        if clear:
            # A page whose pfn kept changing stays unmarked, and so young.
            self._make_idle(settled[young & wanted])
        return young | moving, coarse | moving

    def _heads(self, pfns: Pfns) -> tuple[Pfns, Bits]:
        """Return for each page the pfn that has its idle flag, and whether it is a huge one's."""
        known = np.unique(pfns)
        flags = self._files.flags(known)
        tails = (flags & _KPF_COMPOUND_TAIL) != 0
        huge = tails | ((flags & _KPF_COMPOUND_HEAD) != 0)
        heads = known.copy()
        if tails.any():
            blocks = np.unique(known[tails] >> _BLOCK_SHIFT)
            offsets = np.arange(1 << int(_BLOCK_SHIFT), dtype=np.uint64)
            members = (blocks << _BLOCK_SHIFT)[:, None] | offsets
            is_head = (self._files.flags(members.ravel()) & _KPF_COMPOUND_HEAD) != 0
            starts = np.where(is_head.reshape(members.shape), members, np.uint64(0))
            before = np.maximum.accumulate(starts, axis=1)
            row = np.searchsorted(blocks, known[tails] >> _BLOCK_SHIFT)
            found = before[row, known[tails] & offsets[-1]]
            # A gigantic page's head lies further away; hugetlb has no idle flag anyway.
            heads[tails] = np.where(found != 0, found, known[tails])
        place = np.searchsorted(known, pfns)
        return heads[place], huge[place] & (pfns != 0)

    def _idle(self, pfns: Pfns) -> Bits:
        """Return which pages have the idle flag; pfn 0 has not."""
        indexes, place = np.unique(pfns >> np.uint64(6), return_inverse=True)
        words = self._files.read_idle(indexes)
        idle: Bits = (words[place] >> (pfns & np.uint64(63)) & np.uint64(1)).astype(bool)
        return idle

    def _make_idle(self, pfns: Pfns) -> None:
        if pfns.size:
            indexes, place = np.unique(pfns >> np.uint64(6), return_inverse=True)
            words = np.zeros(indexes.size, dtype=np.uint64)
            np.bitwise_or.at(words, place, np.uint64(1) << (pfns & np.uint64(63)))
            self._files.write_idle(indexes, words)


def _open(path: Path, mode: int) -> int:
    try:
        return os.open(path, mode)
    except OSError as error:
        found, remedy = f"which fails with {error.strerror}", "use --tracker pagemap"
        if error.errno in (errno.EACCES, errno.EPERM):
            found, remedy = "which this user may not open", "run as root or use --tracker pagemap"
        elif error.errno == errno.ENOENT:
            found = "which does not exist"
            remedy = "enable CONFIG_IDLE_PAGE_TRACKING or use --tracker pagemap"
        raise CapabilityError("tracker idle", str(path), found, remedy) from error
