"""Methods to find the touched pages of another process's mapping.

========== ============================================ ============== ===================
method        how                                          sees           changes there
========== ============================================ ============== ===================
idle       the kernel's idle flags, by pfn              reads, writes  idle flags
pageout    ``process_madvise(MADV_PAGEOUT)`` takes the  reads, writes  the page table; with
           pages out of its page table; which came                     swap: pages go there
           back?
written    ``PAGEMAP_SCAN``, where its owner has it     writes         write protection
           write-protected by an asynchronous
           userfaultfd
soft-dirty soft-dirty bits, ``/proc/PID/clear_refs``    writes         soft-dirty bits of
                                                                       the whole process
present    which pages are in its page table            all ever made  nothing
========== ============================================ ============== ===================

Another process cannot zap a mapping (``MADV_DONTNEED`` is for a process's
own mappings), register a userfaultfd on it, or read KVM's dirty log, which only the
process that created the VM can do. ``pageout`` comes closest to a zap: on a host without
swap the kernel unmaps the pages, cannot write them anywhere, and keeps them. It skips
pages that are locked or mapped by several processes; such a page keeps reading as young
and is reported as coarse.
"""

from __future__ import annotations

import errno
import os
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from kvmhost._ffi import check, ffi, lib
from kvmhost.bitmap import (
    Provenance,
    Words,
    YoungBitmap,
    clear_words,
    n_words,
    pack,
    place_words,
    sub_words,
    unpack,
)
from kvmhost.errors import CapabilityError, IoctlError, LayoutError
from kvmhost.process.procmaps import Mapping, shared_ranges
from kvmhost.suggest import unknown_name
from kvmhost.trackers.pagescan import Bits, has_soft_dirty, new_scanner, page_states, scans
from kvmhost.units import PAGE_BYTES

if typing.TYPE_CHECKING:
    from kvmhost.trackers.idle import IdleTracker

__all__ = ["METHODS", "Method", "SoftDirty", "Target", "Written", "open_method"]

_FAULT_AROUND = Path("/sys/kernel/debug/fault_around_bytes")
_FAULT_AROUND_DEFAULT = 64 << 10
#: Pages per chunk, a multiple of 64.
_CHUNK_PAGES = 1 << 13


class Target(Protocol):
    """A mapping of another process."""

    pid: int
    pidfd: int
    pagemap_fd: int
    mapping: Mapping
    proc: Path


class Method(Protocol):
    """Tracks accesses to one mapping. Ranges are in pages of the mapping."""

    name: ClassVar[str]

    def begin(self) -> None:
        """Begin the first window.

        :raises CapabilityError: if this method does not work on this host; states the reason
        """

    def harvest(self, first: int, n_pages: int, clear: bool, mask: Words | None) -> YoungBitmap:
        """Return which pages of a range were touched, and begin a new window with ``clear``."""


class Present:
    """Pages present in the page table: touched since its creation. Clearing has no effect."""

    name: ClassVar[str] = "present"

    def __init__(self, target: Target) -> None:
        self._target = target
        self._scanner = None
        if scans(target.pagemap_fd):
            self._scanner = new_scanner(target.mapping.n_pages)
        around = 1 if target.mapping.quiet else _fault_around_bytes() // PAGE_BYTES
        self._around = max(around, 1)

    def begin(self) -> None:
        """Nothing to do: the window began with the process."""

    def harvest(self, first: int, n_pages: int, clear: bool, mask: Words | None) -> YoungBitmap:
        """Return the pages that are present."""
        present, coarse = self._present_pages(first, n_pages)
        return _bitmap(self.name, first, n_pages, present, coarse, 0)

    def _present_pages(self, first: int, n_pages: int) -> tuple[Words, Words]:
        """Scan a range in chunks, since booleans for all of it would take much memory."""
        present, coarse = np.zeros((2, n_words(n_pages)), dtype=np.uint64)
        for start, count in _chunks(n_pages):
            for words, bits in zip(
                (present, coarse), self._there(first + start, count), strict=True
            ):
                place_words(words, start, pack(bits))
        return present, coarse

    def _there(self, first: int, n_pages: int) -> tuple[Bits, Bits]:
        """Return which pages are present, and which of these fault-around may have mapped.

        The kernel maps a block of pages around a page that is read. A page that it mapped
        has the page that was read less than a block away; a page without such a neighbour
        was itself touched.
        """
        target, reach = self._target, self._around - 1
        start = max(first - reach, 0)
        end = min(first + n_pages + reach, target.mapping.n_pages)
        states = page_states(
            target.pagemap_fd, target.mapping.start + start * PAGE_BYTES, end - start, self._scanner
        )
        near = np.diff(np.flatnonzero(states.present)) <= reach
        crowded = np.append(near, False) | np.insert(near, 0, False)
        coarse = states.huge.copy()
        if near.size:
            coarse[np.flatnonzero(states.present)[crowded]] = True
        here = slice(first - start, first - start + n_pages)
        return states.present[here], coarse[here]


class Pageout(Present):
    """Evicts pages from the page table, and finds which are mapped again."""

    name: ClassVar[str] = "pageout"

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        # Pages that the kernel skipped: always young, and reported as coarse.
        self._stuck: Words = np.zeros(n_words(target.mapping.n_pages), dtype=np.uint64)
        self._last_ns = 0

    def begin(self) -> None:
        """Evict all pages from the page table.

        :raises CapabilityError: if the host has swap, or the kernel does not allow it
        """
        try:
            self._take_all_out(0, self._target.mapping.n_pages, None)
        except IoctlError as error:
            raise CapabilityError(
                "tracker pageout",
                "process_madvise(MADV_PAGEOUT)",
                error.strerror or "",
                "needs Linux 5.10, CAP_SYS_NICE (run as root), and memory that is neither locked "
                "nor in hugetlbfs",
            ) from error
        self._last_ns = time.monotonic_ns()

    def harvest(self, first: int, n_pages: int, clear: bool, mask: Words | None) -> YoungBitmap:
        """Return the pages that are mapped again; evict them with ``clear``."""
        # Before any eviction, since an evicted page no longer counts as a neighbour.
        present, coarse = self._present_pages(first, n_pages)
        coarse |= sub_words(self._stuck, self._target.mapping.n_pages, first, n_pages) & present
        if clear:
            self._take_all_out(first, n_pages, present if mask is None else present & mask)
        since, self._last_ns = self._last_ns, time.monotonic_ns()
        return _bitmap(self.name, first, n_pages, present, coarse, since)

    def _take_all_out(self, first: int, n_pages: int, words: Words | None) -> None:
        """Evict pages of a range (None: all of them).

        :raises CapabilityError: if swap has been enabled on the host meanwhile
        """
        swaps = (self._target.proc / "swaps").read_text().splitlines()[1:]
        if swaps:
            raise CapabilityError(
                "tracker pageout",
                "a host without swap",
                f"{len(swaps)} in /proc/swaps",
                "pages would be written there; use --tracker present, or idle",
            )
        for start, count in _chunks(n_pages):
            chosen = np.ones(count, dtype=bool)
            if words is not None:
                chosen = unpack(sub_words(words, n_pages, start, count), count)
            self._take_out(first + start, chosen)

    def _take_out(self, first: int, chosen: Bits) -> None:
        """Evict pages, and record those that remain mapped."""
        total = self._target.mapping.n_pages
        known = unpack(sub_words(self._stuck, total, first, chosen.size), chosen.size)
        self._ask(first, chosen)
        left = self._left(first, chosen)
        if (left & ~known).any():
            # New pages wait in a per-CPU list; the kernel drains only the list of the CPU
            # on which the call runs.
            before = os.sched_getaffinity(0)
            try:
                for cpu in sorted(before):
                    os.sched_setaffinity(0, {cpu})
                    self._ask(first, left)
                    left = self._left(first, left)
                    if not left.any():
                        break
            finally:
                os.sched_setaffinity(0, before)
        clear_words(self._stuck, first, pack(chosen))
        place_words(self._stuck, first, pack(left))

    def _left(self, first: int, chosen: Bits) -> Bits:
        target = self._target
        address = target.mapping.start + first * PAGE_BYTES
        return page_states(target.pagemap_fd, address, chosen.size, self._scanner).present & chosen

    def _ask(self, first: int, chosen: Bits) -> None:
        """Call ``process_madvise(MADV_PAGEOUT)`` on pages.

        :raises IoctlError: ``EINVAL`` if the kernel refuses every part of the mapping
        """
        refused = self._refusal(first, chosen)
        if refused is None:
            return
        # Some part is locked or has huge pages: call it for each other part.
        mapping, done = self._target.mapping, False
        for start, end in shared_ranges(self._target.proc / str(self._target.pid) / "maps"):
            low = max((start - mapping.start) // PAGE_BYTES, first) - first
            high = min((end - mapping.start) // PAGE_BYTES, first + chosen.size) - first
            if low < high:
                done |= self._refusal(first + low, chosen[low:high]) is None
        if not done:
            raise refused

    def _refusal(self, first: int, chosen: Bits) -> IoctlError | None:
        """Make the call, and return the error if the kernel refuses this kind of memory."""
        try:
            self._ask_range(first, chosen)
        except IoctlError as error:
            if error.errno != errno.EINVAL:
                raise
            return error
        return None

    def _ask_range(self, first: int, chosen: Bits) -> None:
        words = pack(chosen)
        address = self._target.mapping.start + first * PAGE_BYTES
        # SAFETY: words lives until the call returns.
        result = lib.kh_foreign_pageout(
            self._target.pidfd, address, chosen.size, ffi.from_buffer("uint64_t[]", words)
        )
        check(result, "process_madvise", pid=self._target.pid, start=address, pages=chosen.size)


class Written:
    """Write tracking that the owner of the mapping has set up."""

    name: ClassVar[str] = "written"

    def __init__(self, target: Target) -> None:
        self._target = target
        self._scanner = new_scanner(target.mapping.n_pages)
        self._last_ns = 0

    def begin(self) -> None:
        """Protect everything.

        :raises CapabilityError: if the owner did not register it, or without PAGEMAP_SCAN
        """
        try:
            self.harvest(0, self._target.mapping.n_pages, True, None)
        except IoctlError as error:
            raise CapabilityError(
                "tracker written",
                f"an asynchronous userfaultfd of process {self._target.pid} on the mapping, "
                "and PAGEMAP_SCAN",
                error.strerror or "",
                "only the process itself can register one; use --tracker pageout",
            ) from error

    def harvest(self, first: int, n_pages: int, clear: bool, mask: Words | None) -> YoungBitmap:
        """Return the pages that were written; with ``clear`` protect them again."""
        target = self._target
        if clear and mask is not None:
            raise LayoutError("written: a harvest that clears takes no mask")
        words = np.zeros(n_words(n_pages), dtype=np.uint64)
        address = target.mapping.start + first * PAGE_BYTES
        # SAFETY: words lives until the call returns.
        out = ffi.from_buffer("uint64_t[]", words)
        result = lib.kh_scanner_written(
            self._scanner, target.pagemap_fd, address, n_pages, clear, out
        )
        check(result, "PAGEMAP_SCAN", pid=target.pid, start=address, pages=n_pages)
        since, self._last_ns = self._last_ns, time.monotonic_ns()
        return _bitmap(self.name, first, n_pages, words, None, since)


class SoftDirty:
    """Soft-dirty bits. Clearing affects the whole process: other pages' bits are kept here."""

    name: ClassVar[str] = "soft-dirty"

    def __init__(self, target: Target) -> None:
        self._target = target
        self._kept: Words = np.zeros(n_words(target.mapping.n_pages), dtype=np.uint64)
        self._last_ns = 0

    def begin(self) -> None:
        """Clear the soft-dirty bits of the process.

        :raises CapabilityError: without CONFIG_MEM_SOFT_DIRTY
        """
        if not has_soft_dirty():
            raise CapabilityError(
                "tracker soft-dirty", "soft-dirty bits", "none on a page just written",
                "use a kernel with CONFIG_MEM_SOFT_DIRTY, or --tracker pageout",
            )  # fmt: skip
        self._clear_all()
        self._last_ns = time.monotonic_ns()

    def harvest(self, first: int, n_pages: int, clear: bool, mask: Words | None) -> YoungBitmap:
        """Return the pages that were written."""
        target, total = self._target, self._target.mapping.n_pages
        # SAFETY: the array lives until the call returns. Bits are only ever added.
        out = ffi.from_buffer("uint64_t[]", self._kept)
        result = lib.kh_pagemap_soft_dirty(target.pagemap_fd, target.mapping.start, total, out)
        check(result, "pread(pagemap)", pid=target.pid)
        found = sub_words(self._kept, total, first, n_pages).copy()
        if clear:
            self._clear_all()
            clear_words(self._kept, first, found if mask is None else found & mask)
        since, self._last_ns = self._last_ns, time.monotonic_ns()
        return _bitmap(self.name, first, n_pages, found, None, since)

    def _clear_all(self) -> None:
        (self._target.proc / str(self._target.pid) / "clear_refs").write_text("4\n")


class Idle:
    """The kernel's idle flags, for the pages of another process."""

    name: ClassVar[str] = "idle"

    def __init__(self, target: Target) -> None:
        self._target = target
        self._tracker: IdleTracker | None = None

    def begin(self) -> None:
        """Make every page idle.

        :raises CapabilityError: without CONFIG_IDLE_PAGE_TRACKING or CAP_SYS_ADMIN
        """
        from kvmhost.trackers.idle import IDLE_BITMAP, IdleFiles, IdleTracker

        files = IdleFiles(IDLE_BITMAP, self._target.proc / str(self._target.pid) / "pagemap")
        self._tracker = IdleTracker.on_mapping(
            self._target.mapping.start, self._target.mapping.n_pages, files
        )
        self._tracker.start()

    def harvest(self, first: int, n_pages: int, clear: bool, mask: Words | None) -> YoungBitmap:
        """Return the pages that are not idle."""
        assert self._tracker is not None, "begin() comes first"
        return self._tracker.harvest(first, n_pages, clear, mask)


#: Methods by name, the most informative one first.
METHODS: dict[str, Callable[[Target], Method]] = {
    Idle.name: Idle,
    Pageout.name: Pageout,
    Written.name: Written,
    SoftDirty.name: SoftDirty,
    Present.name: Present,
}
#: Those that ``auto`` tries, in this order: they see reads, and they see a window.
_AUTO = (Idle.name, Pageout.name)


def open_method(name: str, target: Target) -> Method:
    """Return a method that has begun its first window.

    :param name: one of :data:`METHODS`, or ``auto``
    :raises LayoutError: for an unknown name
    :raises CapabilityError: if it does not work here; ``auto`` states every reason
    """
    if name not in ("auto", *METHODS):
        raise LayoutError(unknown_name("tracker for another process", name, ("auto", *METHODS)))
    refused = []
    for candidate in _AUTO if name == "auto" else (name,):
        method = METHODS[candidate](target)
        try:
            method.begin()
        except CapabilityError as error:
            if name != "auto":
                raise
            refused.append(f"{candidate}: {error.found}")
            continue
        return method
    raise CapabilityError(
        "attach", "a method to see reads from outside", "; ".join(refused),
        "use --tracker present, or --tracker written where the process tracks writes",
    )  # fmt: skip


def _chunks(n_pages: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n_pages, _CHUNK_PAGES):
        yield start, min(_CHUNK_PAGES, n_pages - start)


def _bitmap(
    method: str, first: int, n_pages: int, young: Words, coarse: Words | None, since_ns: int
) -> YoungBitmap:
    source = Provenance(method, "host-process", since_ns, time.monotonic_ns())
    marked = coarse if coarse is not None and coarse.any() else None
    return YoungBitmap(first, n_pages, young, marked, source)


def _fault_around_bytes() -> int:
    try:
        return int(_FAULT_AROUND.read_text())
    except (OSError, ValueError):
        return _FAULT_AROUND_DEFAULT
