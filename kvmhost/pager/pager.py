"""Eviction and fault-in for one VM: the Python interface of the C pager.

Evicting a page: write-protect it in both mappings, copy it out of the memfd,
compress it into the store, punch it out. A concurrent write waits in the
kernel until that is done. Restoring a page: a missing fault, through either mapping,
copies the page in and wakes the waiting threads. Everything per page is in C
(``kvmhost/_core/pager.c``); the fault handler is a thread that stays there, without
the interpreter lock, whose holder may be waiting for a page. Another thread reports
faults that the handler cannot serve.

A full store refuses evictions; it never drops a page.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmhost._ffi import check, ffi, lib
from kvmhost.bitmap import YoungBitmap, sub_words
from kvmhost.errors import CapabilityError, IoctlError, LostPageError, PagerError, StateError
from kvmhost.memory.guest import GuestMemory, pieces
from kvmhost.memory.pagelist import PageList, page_list
from kvmhost.pager.codec import find_codec
from kvmhost.pager.hostswap import swap_refusal
from kvmhost.pager.hugepages import has_odd_sizes
from kvmhost.pager.options import StoreOptions
from kvmhost.pager.results import (
    DropResult,
    EvictOutcome,
    EvictResult,
    PageEvent,
    PageEvents,
    PageState,
    RestoreResult,
    ShrinkResult,
)
from kvmhost.pager.storefile import StoreFile
from kvmhost.pager.userfault import Userfault
from kvmhost.signals import signals_deferred, start_threads
from kvmhost.units import PAGE_SHIFT
from kvmhost.vm.checks import check_resident_max

__all__ = ["Gfns", "Pager"]

#: Pages to process; a :class:`~kvmhost.memory.pagelist.PageList` is not checked again.
Gfns = PageList | Iterable[int] | npt.NDArray[Any]


class Pager:
    """Owns the evicted pages of a VM.

    :param options: where and how evicted pages are stored
    :param on_failure: called once, in a thread of its own, if a fault cannot be served;
        guest threads that wait for such a page keep waiting until the VM stops
    :raises LayoutError: if the store's file cannot be made
    :raises CapabilityError: if the codec is not available
    """

    def __init__(
        self,
        memory: GuestMemory,
        userfault: Userfault,
        options: StoreOptions | None = None,
        *,
        on_failure: Callable[[PagerError], None] | None = None,
    ) -> None:
        self._memory, self._on_failure = memory, on_failure
        self._userfault = userfault
        self._pointer = ffi.NULL
        self._file: StoreFile | None = None
        self.options = options or StoreOptions()
        self.codec = find_codec(self.options.codec)
        if self.options.path is not None:
            self._file = self._make_file(self.options.path)
        # SAFETY: owned here, freed in close() after the handler thread has ended.
        self._pointer = lib.kh_pager_new(
            userfault.fd, memory.n_pages, self.codec.core, self._file.fd if self._file else -1
        )
        if self._pointer == ffi.NULL:
            raise PagerError("out of memory for the pager")
        for region in memory.regions:
            check(
                lib.kh_pager_add_region(
                    self._core,
                    region.memfd,
                    region.guest_address,
                    region.alias_address,
                    region.n_pages,
                ),
                "kh_pager_add_region",
                gpa=region.gpa,
            )
        lib.kh_pager_set_store(
            self._core, self.options.limit_bytes, int(self.options.refuse_incompressible)
        )
        lib.kh_pager_set_prefetch(self._core, self.options.prefetch_pages)
        lib.kh_pager_set_memory_wait(self._core, int(self.options.memory_wait_s * 1e9))
        self._threads: list[threading.Thread] = []
        self._arming = threading.Lock()
        self._armed = False

    def _make_file(self, path: Path) -> StoreFile:
        if not self.codec.checked:
            # A file can be damaged by other processes: its pages always carry a checksum.
            raise CapabilityError(
                "store file",
                "checksums (xxhash)",
                "none",
                "install the package xxhash from PyPI as a wheel",
            )
        return StoreFile(path)

    def arm(self) -> None:
        """Start to catch faults. Idempotent.

        From then on the first touch of a fresh page costs a message as well; a VM that
        never evicts does not pay for it.

        :raises IoctlError: if a mapping cannot be registered; then none is, and the
            call may be repeated
        :raises CapabilityError: while the tracker ``uffd`` runs
        """
        with self._arming:
            if self._armed:
                return
            self._userfault.claim("pager")
            self._start_threads()
            odd_sizes = self._memory.was_punched or has_odd_sizes()
            result = lib.kh_pager_arm(self._core, int(odd_sizes))
            if result < 0:
                self._userfault.release("pager", self._memory.regions)
                raise IoctlError("UFFDIO_REGISTER", -result)
            self._armed = True

    def _start_threads(self) -> None:
        if self._threads:
            return
        with signals_deferred():
            self._threads = [
                threading.Thread(target=work, name=name, daemon=True)
                for name, work in (("pager", self._serve), ("pager-failures", self._report_failure))
            ]
            start_threads(*self._threads)
        # A thread that touches an evicted page may hold the interpreter lock: by
        # then the handler has to be in C, where it needs no such lock.
        lib.kh_pager_wait_serving(self._core)

    @property
    def armed(self) -> bool:
        """Whether faults are being caught."""
        return self._armed

    def evict(self, gfns: Gfns, *, event: PageEvent = PageEvent.EVICTED_REQUEST) -> EvictResult:
        """Evict pages, in the given order; partial success is normal.

        :param event: who decided so, for :meth:`events`
        :raises LayoutError: if a gfn is in no region; then nothing was evicted
        """
        pages = page_list(self._memory, gfns)
        self.arm()
        return self._batch(lib.kh_pager_evict, "kh_pager_evict", pages, int(event))

    def _batch(
        self, call: Callable[..., int], name: str, pages: PageList, *options: int
    ) -> EvictResult:
        outcomes = np.zeros(pages.indexes.size, dtype=np.uint8)
        # SAFETY: both arrays live until the call returns.
        buffer = ffi.from_buffer("uint8_t[]", outcomes, require_writable=True)
        given = ffi.from_buffer("uint32_t[]", pages.indexes)
        check(call(self._core, given, outcomes.size, *options, buffer), name, n=outcomes.size)
        return EvictResult(pages.gfns, outcomes)

    def page_out(
        self,
        gfns: Gfns,
        refusal: Callable[[], str | None] = swap_refusal,
    ) -> EvictResult:
        """Evict pages to the host's swap, without arming; partial success is normal.

        A page that the kernel keeps is ``REFUSED``. The kernel restores an evicted
        page at its next touch.

        :param refusal: returns why the host cannot do this, or None
        :raises CapabilityError: if the host has no swap; then nothing was done
        :raises LayoutError: if a gfn is in no region
        """
        reason = refusal()
        if reason is not None:
            raise CapabilityError("host swap", "free swap space", reason, "add swap, or evict")
        pages = page_list(self._memory, gfns)
        return self._batch(lib.kh_pager_pageout, "kh_pager_pageout", pages)

    def restore(self, gfn: int, n_pages: int = 1) -> RestoreResult:
        """Restore evicted pages of ``[gfn, gfn + n_pages)``; a failure does not stop the others."""
        result = ffi.new("struct kh_restore_result *")
        for region, start, count in pieces(self._memory.regions, gfn, n_pages):
            part = ffi.new("struct kh_restore_result *")
            index = self._memory.index_of_gfn(start)
            check(lib.kh_pager_restore(self._core, index, count, part), "restore", gfn=region.gfn)
            result.restored += part.restored
            result.lost += part.lost
            result.left += part.left
        return RestoreResult(int(result.restored), int(result.lost), int(result.left))

    def drain(self) -> RestoreResult:
        """Restore all pages and stop evicting: removes the limit and the victim list.

        The guest finds its pages resident afterwards, except those that a concurrent
        request evicts again.
        """
        if not self._armed:
            return RestoreResult(0, 0, 0)
        lib.kh_pager_set_limit(self._core, 0)
        self.set_victims([])
        return self.restore(0, self._memory.gfn_end)

    def drop(self, gfn: int, n_pages: int = 1) -> DropResult:
        """Discard pages that the guest declared free; they read as zeros.

        :raises LayoutError: if the range is not in one region; then nothing was dropped
        """
        self._memory.region_at(gfn << PAGE_SHIFT, n_pages << PAGE_SHIFT)
        result = ffi.new("struct kh_drop_result *")
        index = self._memory.index_of_gfn(gfn)
        check(lib.kh_pager_drop(self._core, index, n_pages, result), "drop", gfn=gfn)
        return DropResult(int(result.dropped), int(result.pinned), int(result.failed))

    def pin(self, gfn: int, n_pages: int = 1) -> None:
        """Exclude pages from eviction; evicted ones are restored first."""
        index = self._memory.index_of_gfn(gfn)
        if check(lib.kh_pager_pin(self._core, index, n_pages, 1), "kh_pager_pin", gfn=gfn):
            self.restore(gfn, n_pages)

    def set_limit(self, resident_max_bytes: int) -> None:
        """Limit the resident bytes, enforced by the fault handler; 0: no limit.

        The limit is rounded down to pages.

        At the limit each fault first evicts a page: one from :meth:`set_victims`, or, if
        none is left, one that the clock hand finds (see :meth:`note_young`).
        """
        check_resident_max(resident_max_bytes)
        self.arm()
        lib.kh_pager_set_limit(self._core, resident_max_bytes >> PAGE_SHIFT)

    @property
    def resident_max_bytes(self) -> int:
        """The limit of :meth:`set_limit`; 0: none."""
        return int(lib.kh_pager_limit(self._core)) << PAGE_SHIFT

    @contextlib.contextmanager
    def frozen(self) -> Iterator[Any]:
        """Block evictions, restores and changes of the limit inside the context.

        Such calls wait for the end of the context. Faults are still served, within the
        limit: no thread that touches guest memory waits for the thread in the context.

        :return: the C pager, for :mod:`kvmhost.machine.chunks`
        """
        lib.kh_pager_freeze(self._core)
        try:
            yield self._core
        finally:
            lib.kh_pager_thaw(self._core)

    @property
    def _core(self) -> Any:
        """The C pager, for one call.

        :raises StateError: if the pager is closed
        """
        # SAFETY: freed in close() alone, which is called after every other method has returned.
        if self._pointer == ffi.NULL:
            raise StateError("the pager")
        return self._pointer

    @property
    def core(self) -> Any:
        """The C pager, for :mod:`kvmhost.machine.chunks`."""
        return self._core

    def shrink(self) -> ShrinkResult:
        """Evict until the limit of :meth:`set_limit` holds, or every page was tried.

        A limit alone acts at the next fault: pages that are resident already stay.
        Victims are chosen as in the fault handler.
        """
        self.arm()
        result = ffi.new("struct kh_shrink_result *")
        lib.kh_pager_shrink(self._core, result)
        return ShrinkResult(int(result.evicted), int(result.over_pages))

    def set_victims(self, gfns: Gfns) -> None:
        """Set the pages to evict first at the limit, best candidates first."""
        index = page_list(self._memory, gfns).indexes
        # SAFETY: the array lives until the call returns.
        check(
            lib.kh_pager_set_victims(self._core, ffi.from_buffer("uint32_t[]", index), index.size),
            "kh_pager_set_victims",
            n=index.size,
        )

    def note_young(self, young: YoungBitmap) -> None:
        """Record which pages were young in the window that a harvest has just ended.

        Only the clock hand of the resident limit uses it: pages that were young in
        few of the last eight windows are evicted first.
        """
        for region, start, count in pieces(self._memory.regions, young.gfn_start, young.n_pages):
            words = sub_words(young.words, young.n_pages, start - young.gfn_start, count)
            index = self._memory.index_of_gfn(start)
            check(
                lib.kh_pager_note_young(
                    self._core, index, count, ffi.from_buffer("uint64_t[]", words)
                ),
                "kh_pager_note_young",
                gfn=region.gfn,
            )

    def states(self) -> npt.NDArray[np.uint8]:
        """Return every page's :class:`PageState`, by region: shape ``(n_pages,)``."""
        if not self.armed:
            states = np.full(self._memory.n_pages, PageState.FRESH, dtype=np.uint8)
            states[self._memory.held()] = PageState.SWAPPED
            states[self._memory.resident()] = PageState.RESIDENT
            return states
        states = np.zeros(self._memory.n_pages, dtype=np.uint8)
        buffer = ffi.from_buffer("uint8_t[]", states, require_writable=True)
        check(lib.kh_pager_state(self._core, 0, states.size, buffer), "kh_pager_state")
        return states

    def state(self, gfn: int) -> PageState:
        """Return one page's state."""
        index = self._memory.index_of_gfn(gfn)
        if not self.armed:
            return PageState(self.states()[index])
        buffer = ffi.new("uint8_t *")
        check(lib.kh_pager_state(self._core, index, 1, buffer), "kh_pager_state", gfn=gfn)
        return PageState(buffer[0])

    def stored_bytes(self, gfn: int) -> int:
        """Return the size of one page in the store."""
        return int(lib.kh_pager_stored_bytes(self._core, self._memory.index_of_gfn(gfn)))

    def counters(self) -> dict[str, Any]:
        """Return all counters; ``outcomes`` by name, ``latency_ns`` as a histogram.

        The histogram's bucket ``b`` counts fault-ins that took ``[2**b, 2**(b + 1))`` ns
        in the handler, evictions at the limit included; ``latency_sum_ns`` is their sum.
        """
        raw = ffi.new("struct kh_pager_counters *")
        lib.kh_pager_counters(self._core, raw)
        shown: dict[str, Any] = {
            name: int(getattr(raw, name))
            for name, _ in ffi.typeof(raw[0]).fields
            if name not in ("outcomes", "latency")
        }
        shown["outcomes"] = {o.name.lower(): int(raw.outcomes[o]) for o in EvictOutcome}
        shown["latency_ns"] = [int(raw.latency[b]) for b in range(lib.KH_LATENCY_BUCKETS)]
        return shown

    def events(self, since: int = 0, most: int | None = None) -> PageEvents:
        """Return what happened to pages, from event number ``since`` on.

        The latest events are kept, four for each page but at least 65,536 and at most
        1,048,576. Any number of readers can ask, each from its own number on. Pages in
        the host's swap have no events.

        :param most: return at most so many events, the oldest ones; None: all
        """
        position = ffi.new("struct kh_log_position *")
        lib.kh_pager_read_log(self._core, since, ffi.NULL, 0, position)
        size = int(position.end) - min(since + int(position.lost), int(position.end))
        size = size if most is None else min(size, most)
        raw = np.zeros(size, dtype=np.uint64)
        # SAFETY: the array lives until the call returns.
        buffer = ffi.from_buffer("uint64_t[]", raw, require_writable=True)
        found = int(lib.kh_pager_read_log(self._core, since, buffer, size, position))
        indexes = (raw[:found] & np.uint64(0xFFFF_FFFF)).astype(np.int64)
        return PageEvents(
            gfns=_gfns_of(self._memory, indexes),
            events=(raw[:found] >> np.uint64(32)).astype(np.uint8),
            next=int(position.next),
            lost=int(position.lost),
            left=int(position.end - position.next),
        )

    def inject_failures(
        self, stores: int = 0, loads: int = 0, fills: int = 0, splits: int = 0
    ) -> None:
        """Make the given number of next operations of each kind fail. For tests.

        :param stores: the store does not take a page
        :param loads: the store does not return a page
        :param fills: the host has no memory for a page
        :param splits: a huge page is not noticed before pages of it are punched
        """
        failures = {"stores": stores, "loads": loads, "fills": fills, "splits": splits}
        lib.kh_pager_inject(self._core, ffi.new("struct kh_injection *", failures))

    def fake_swap(self, gfn: int, n_pages: int = 1, swapped: bool = True) -> None:
        """Mark pages as being in the host's swap, or not. For tests."""
        index = self._memory.index_of_gfn(gfn)
        check(lib.kh_pager_fake_swap(self._core, index, n_pages, swapped), "fake_swap", gfn=gfn)

    def stop(self) -> None:
        """End the fault handler. No thread may wait for a page by then. Idempotent."""
        if self._threads and self._pointer != ffi.NULL:
            lib.kh_pager_stop(self._core)
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join()

    def close(self) -> None:
        """Stop, and free the store. Idempotent."""
        if self._pointer != ffi.NULL:
            self.stop()
            pointer, self._pointer = self._pointer, ffi.NULL
            lib.kh_pager_free(pointer)
        if self._file is not None:
            self._file.close()

    def _serve(self) -> None:
        check(lib.kh_thread_mask_signals(), "pthread_sigmask")
        # _report_failure reports failures of the handler.
        lib.kh_pager_serve(self._core)

    def _report_failure(self) -> None:
        check(lib.kh_thread_mask_signals(), "pthread_sigmask")
        number = lib.kh_pager_wait_failure(self._core)
        if number and self._on_failure is not None:
            self._on_failure(self._failure(number))

    def _failure(self, number: int) -> PagerError:
        if number == errno.ENOMEM:
            return PagerError(
                "the host has no memory for a guest page: a fault waited for "
                f"{self.options.memory_wait_s:g} s, and no page could be evicted to make some"
            )
        lost = self.lost_gfns()
        if lost:
            return LostPageError(lost, self.lost_reason())
        return PagerError(f"the fault handler failed: {os.strerror(number)}")

    def lost_gfns(self) -> list[int]:
        """Return the pages that the store could not restore."""
        lost = np.flatnonzero(self.states() == PageState.LOST)
        gfns, first = [], 0
        for region in self._memory.regions:
            inside = lost[(lost >= first) & (lost < first + region.n_pages)]
            gfns += [int(index) - first + region.gfn for index in inside]
            first += region.n_pages
        return gfns

    def lost_reason(self) -> str:
        """Return the reason for the last lost page."""
        number = lib.kh_pager_lost_errno(self._core)
        where = f" in {self.options.path}" if self.options.path else ""
        if number == errno.EBADMSG:
            return f"its checksum does not fit{where}"
        return f"it cannot be read{where}: {os.strerror(number)}"


def _gfns_of(memory: GuestMemory, indexes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the gfns of pages that are numbered over all regions."""
    sizes = np.array([region.n_pages for region in memory.regions], dtype=np.int64)
    starts = np.array([region.gfn for region in memory.regions], dtype=np.int64)
    ends = np.cumsum(sizes)
    where = np.searchsorted(ends, indexes, side="right")
    found: npt.NDArray[np.int64] = starts[where] + indexes - (ends - sizes)[where]
    return found
