"""Test-and-clear over a range, in its two forms, for every table that C walks.

:class:`WalkedTable` is what a table that this layer owns and a guest's live table have
in common: both are walked by the same C code (``_core/mmu_harvest.c``), which takes no
lock and flushes no TLB.

Departures of :meth:`WalkedTable.test_clear_young` from the proposal of 2023: a page flips its bit
once and not once per entry that maps it (two roots, or two slots, flip it back there); a young
huge leaf flips the bit of every page that it covers in the range, and is cleared if any of
them was asked for; a bit that hardware sets between test and clear is never lost, since the
clear is tried again (there, a failed compare-and-swap is ignored); on powerpc, tables are
freed after a grace period, where the proposal lets a walk meet a table that was reused
(``SLAB_TYPESAFE_BY_RCU``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from kvmhost._ffi import check, ffi, lib
from kvmhost.bitmap import Provenance, Words, YoungBitmap, n_words, pack, unpack
from kvmhost.errors import LayoutError, StateError, TableError
from kvmhost.mmu.memslots import MemSlots

__all__ = ["Handle", "Hold", "WalkedTable", "words_pointer"]

_STATS = (
    "tables",
    "huge_leaves",
    "young",
    "cleared",
    "lost",
    "bad_pointers",
    "poisoned",
    "yields",
)
_REFUSED = {
    lib.KH_BAD_OUTSIDE: "points outside the table memory",
    lib.KH_BAD_LOOP: "points to a table that contains it",
    lib.KH_BAD_LEAF: "is a leaf, where the format has none",
    lib.KH_BAD_WIDTH: "names another index width than the next level has",
}


@dataclasses.dataclass(frozen=True)
class Hold:
    """A pointer that stays valid until :attr:`close` is called."""

    pointer: Any
    close: Callable[[], None]


class Handle:
    """Owns a ``struct kh_mmu *``; closing waits for the calls that still use it."""

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer
        self._users = 0
        self._idle = threading.Condition()

    @contextlib.contextmanager
    def use(self) -> Iterator[Any]:
        """Keep the pointer alive for a call.

        :raises StateError: if it is closed
        """
        with self._idle:
            if self._pointer is None:
                raise StateError("the table")
            self._users += 1
            pointer = self._pointer
        try:
            yield pointer
        finally:
            with self._idle:
                self._users -= 1
                self._idle.notify_all()

    def hold(self) -> Hold:
        """Keep the pointer valid beyond a call, until the hold is closed."""
        stack = contextlib.ExitStack()
        return Hold(stack.enter_context(self.use()), stack.close)

    def close(self) -> None:
        """Free the tables once no thread is inside a call. Idempotent."""
        with self._idle:
            pointer, self._pointer = self._pointer, None
            self._idle.wait_for(lambda: self._users == 0)
        if pointer is not None:
            lib.kh_mmu_close(pointer)


def words_pointer(words: Words | None) -> Any:
    """Return a ``uint64_t *`` to an array, NULL for None."""
    # SAFETY: the caller references the array while C uses the pointer (one call).
    return ffi.NULL if words is None else ffi.cast("uint64_t *", words.ctypes.data)


class WalkedTable:
    """Harvests over a table.

    Counters of all walks add up in :meth:`stats`; ``bad_pointers`` counts entries that
    point outside the table memory, which are passed by.
    """

    table_format = "none"
    tracker = "mmu"

    def __init__(self, handle: Handle, slots: MemSlots | None, page_bytes: int) -> None:
        self._handle = handle
        self._slots = slots
        self.page_bytes = page_bytes
        self._stats = dict.fromkeys(_STATS, 0)
        self._stats_lock = threading.Lock()
        self._last_harvest_ns = 0

    @property
    def slots(self) -> MemSlots | None:
        """The memslots as of now; None if every gfn is taken to exist."""
        return self._slots

    @contextlib.contextmanager
    def hold_open(self) -> Iterator[Any]:
        """Yield the C pointer for the duration of a block."""
        with self._handle.use() as pointer:
            yield pointer

    def hold(self) -> Hold:
        """Keep the tables open for something that runs on in C."""
        return self._handle.hold()

    def close(self) -> None:
        """Free the tables; waits for calls that still use them."""
        self._handle.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def stats(self) -> dict[str, int]:
        """Return what all walks so far met, by name (``struct kh_walk_stats``)."""
        with self._stats_lock:
            return dict(self._stats)

    def harvest(
        self,
        gfn_start: int,
        n_pages: int,
        clear: bool = True,
        mask: Words | None = None,
        provenance: Provenance | None = None,
        *,
        as_id: int = 0,
        locked: bool = False,
    ) -> YoungBitmap:
        """Test, or test and clear, the accessed bits of a range, without a lock.

        A young huge leaf sets the bit of every page that it covers inside the range; it is
        cleared if any of those was to be cleared, and marked in the coarse bitmap. Bits of
        gfns outside every memslot are 0. No TLB is flushed: a page whose translation is
        cached may be used again without becoming young.

        :param mask: shape ``(ceil(n_pages / 64),)``; clear only where the bit is 1. Young
            pages are reported everywhere
        :param locked: hold the MMU lock for write, as before 2023; for comparison only
        :raises LayoutError: if the range or the mask does not fit
        """
        flags = (lib.KH_HARVEST_CLEAR if clear else 0) | (lib.KH_HARVEST_LOCKED if locked else 0)
        return self._array_form(gfn_start, n_pages, flags, mask, provenance, as_id)

    def harvest_dirty(
        self,
        gfn_start: int,
        n_pages: int,
        clear: bool = True,
        mask: Words | None = None,
        provenance: Provenance | None = None,
        *,
        as_id: int = 0,
    ) -> YoungBitmap:
        """Do the same for the dirty state (``test_clear_dirty``)."""
        flags = lib.KH_HARVEST_DIRTY | (lib.KH_HARVEST_CLEAR if clear else 0)
        return self._array_form(gfn_start, n_pages, flags, mask, provenance, as_id)

    def test_clear_young(
        self,
        start_hva: int,
        end_hva: int,
        bitmap: Words,
        may_go_on: Callable[[], bool] = lambda: True,
    ) -> int:
        """Do it in the form proposed in 2023.

        Bit ``(end_hva - addr) / page_bytes - 1`` of ``bitmap`` represents ``addr``. Each
        young page flips its bit; the accessed bit is cleared only where the bit was 1 on
        entry. So a caller tests with 0 and tests and clears with 1. A page that several
        slots map flips its bit once, if any of them is young.

        :param end_hva: 0 or 2**64 is the top of the address space
        :param bitmap: changed in place; shape ``(ceil(n_pages / 64),)``
        :param may_go_on: called before each memslot; False leaves it and those after it out
        :return: number of young pages
        :raises LayoutError: if the range is unaligned or empty, or the bitmap too short
        """
        if self._slots is None:
            raise LayoutError("test_clear_young: needs memslots to find gfns by hva")
        end = end_hva or 1 << 64
        n_pages = (end - start_hva) // self.page_bytes
        if start_hva % self.page_bytes or end % self.page_bytes or n_pages <= 0:
            raise LayoutError(f"test_clear_young: bad range [{start_hva:#x}, {end:#x})")
        if bitmap.dtype != np.uint64 or bitmap.shape[0] < n_words(n_pages):
            raise LayoutError(f"test_clear_young: bitmap too short for {n_pages} pages")
        asked = unpack(bitmap, n_pages)[::-1]
        segments = [
            (p.gfn_start, p.n_pages, p.index, p.slot.as_id)
            for p in itertools.takewhile(
                lambda _: may_go_on(), self._slots.in_hva_range(start_hva, end)
            )
        ]
        young = np.zeros(n_words(n_pages), dtype=np.uint64)
        coarse = np.zeros_like(young)
        self._run(segments, lib.KH_HARVEST_CLEAR, pack(asked), young, coarse)
        found = unpack(young, n_pages)
        bitmap[: n_words(n_pages)] ^= pack(found[::-1])
        return int(found.sum())

    def _array_form(
        self,
        gfn_start: int,
        n_pages: int,
        flags: int,
        mask: Words | None,
        provenance: Provenance | None,
        as_id: int,
    ) -> YoungBitmap:
        if gfn_start < 0 or n_pages < 0 or gfn_start + n_pages > 1 << 52:
            raise LayoutError(f"harvest: bad range of {n_pages} pages from {gfn_start:#x}")
        if mask is not None:
            if mask.shape != (n_words(n_pages),):
                raise LayoutError(f"harvest: mask of shape {mask.shape} for {n_pages} pages")
            mask = np.ascontiguousarray(mask, dtype=np.uint64)
        young = np.zeros(n_words(n_pages), dtype=np.uint64)
        coarse = np.zeros(n_words(n_pages), dtype=np.uint64)
        segments: Iterable[tuple[int, int, int, int]] = [(gfn_start, n_pages, 0, as_id)]
        if self._slots is not None:
            segments = [
                (p.gfn_start, p.n_pages, p.index, as_id)
                for p in self._slots.in_gfn_range(gfn_start, n_pages, as_id)
            ]
        huge = self._run(segments, flags, mask, young, coarse)
        if provenance is None:
            provenance = self._provenance()
        return YoungBitmap(
            gfn_start, n_pages, young, coarse if huge and coarse.any() else None, provenance
        )

    def _provenance(self) -> Provenance:
        start, self._last_harvest_ns = self._last_harvest_ns, time.monotonic_ns()
        return Provenance(self.tracker, self.table_format, start, self._last_harvest_ns)

    def _run(
        self,
        segments: Iterable[tuple[int, int, int, int]],
        flags: int,
        mask: Words | None,
        young: Words,
        coarse: Words,
    ) -> int:
        """Walk; return the number of huge leaves met.

        :raises TableError: for tables of a KVM, if an entry is refused
        """
        c_segments = ffi.new(
            "struct kh_segment[]",
            [{"gfn_start": g, "n_pages": n, "bit": b, "as_id": a} for g, n, b, a in segments],
        )
        stats = ffi.new("struct kh_walk_stats *")
        bad = ffi.new("struct kh_bad_entry *")
        with self._handle.use() as mmu:
            # SAFETY: the arrays are this call's own and live until it returns.
            result = lib.kh_mmu_harvest_checked(
                mmu,
                c_segments,
                len(c_segments),
                flags,
                words_pointer(mask),
                words_pointer(young),
                words_pointer(coarse),
                stats,
                bad,
            )
        with self._stats_lock:
            for name in _STATS:
                self._stats[name] += getattr(stats, name)
        if result == -errno.EUCLEAN:
            raise TableError(
                _REFUSED[bad.reason],
                int(bad.gfn),
                int(bad.level),
                int(bad.entry),
                int(stats.cleared),
            )
        check(result, "kh_mmu_harvest", flags=flags)
        return int(stats.huge_leaves)
