"""Tables that this layer owns: what changes them, and how.

:class:`Mmu` is what the three walkers have in common, over ``_core/mmu_ops.c``. Which
lock each operation takes, and why the harvest takes none, is in ``docs/mmu.md``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kvmhost._ffi import check, ffi, lib
from kvmhost.bitmap import Words, n_words
from kvmhost.errors import LayoutError
from kvmhost.mmu.formats import Entry, Format, by_name
from kvmhost.mmu.harvest import Handle, WalkedTable, words_pointer
from kvmhost.mmu.memslots import MemSlot, MemSlots

__all__ = ["Mmu"]

_STATS = (
    "born_young",
    "set_young",
    "copied_young",
    "merged_young",
    "dropped_young",
    "cleared_young",
    "faults",
    "fault_retries",
    "flushes",
    "deferred",
    "lock_waits",
    "lock_wait_ns",
    "table_bytes",
    "retired",
    "freed",
    "roots",
    "tlbs_dirty",
    "tlb_seq",
    "invalidate_seq",
    "invalidate_in_progress",
)
_ARENA_UNIT = 1 << 16
_IDS = {
    "npt": lib.KH_FMT_NPT,
    "ept": lib.KH_FMT_EPT,
    "stage2": lib.KH_FMT_STAGE2,
    "radix": lib.KH_FMT_RADIX,
}
#: mmu_invalidate_retry_gfn() and mmu_invalidate_retry(), include/linux/kvm_host.h.
_RETRY = {None: 0, True: lib.KH_MMU_RANGE_RETRY, False: lib.KH_MMU_PLAIN_RETRY}


class Mmu(WalkedTable):
    """A secondary MMU: an arena of tables, its roots, memslots, and the operations.

    A gfn counts base pages of the table; a pfn counts 4 KiB frames. Ranges are
    ``[start, end)`` of gfns. An operation that touches part of a huge leaf does what it
    does to the whole leaf, as in the kernel.

    :param table_format: ``"npt"``, ``"ept"``, ``"stage2"`` or ``"radix"``
    :param levels: tdp only: 4 or 5
    :param ipa_bits: stage 2 only: 32 to 48
    :param page_shift: radix only: 12 or 16
    :param n_as: number of address spaces, each with a root
    :param sw_access: accessed and dirty state are set by the fault handler, as on arm64
        without FEAT_HAFDBS (stage 2 and radix)
    :param poison: fill freed table pages with a pattern that every walk detects
    :param range_retry: whether an invalidation in progress holds up only faults on its own
        gfns, or all of them. None: as KVM for the format; x86 compares the range, arm64
        and powerpc do not
    :param arena_bytes: room for table pages, rounded up to 64 KiB; unused room uses no memory
    :param arena_pa: made-up physical address of the arena, a multiple of 64 KiB
    :raises IoctlError: ``EINVAL`` if the parameters do not fit the format
    """

    def __init__(
        self,
        table_format: str = "npt",
        *,
        levels: int = 0,
        ipa_bits: int = 0,
        page_shift: int = 12,
        n_as: int = 1,
        sw_access: bool = False,
        poison: bool = False,
        range_retry: bool | None = None,
        arena_bytes: int = 64 << 20,
        arena_pa: int = 1 << 32,
        slots: MemSlots | None = None,
    ) -> None:
        self.format: Format = by_name(table_format, page_shift=page_shift, sw_access=sw_access)
        if sw_access and table_format in ("npt", "ept"):
            raise LayoutError(f"{table_format}: accessed bits by software are not modelled")
        self.table_format = table_format
        self.format_id: int = _IDS[table_format]
        self.sw_access = sw_access
        self.n_as = n_as
        config = ffi.new(
            "struct kh_mmu_config *",
            {
                "format": self.format_id,
                "levels": levels,
                "ipa_bits": ipa_bits,
                "page_shift": page_shift,
                "n_as": n_as,
                "arena_pa": arena_pa,
                "arena_bytes": -(-arena_bytes // _ARENA_UNIT) * _ARENA_UNIT,
                "flags": (lib.KH_MMU_POISON if poison else 0)
                | (lib.KH_MMU_SW_ACCESS if sw_access else 0)
                | _RETRY[range_retry],
            },
        )
        shape = ffi.new("struct kh_mmu_shape *")
        check(lib.kh_mmu_shape(config, shape), "kh_mmu_shape", **self._shape_arguments(config))
        self.n_levels = int(shape.n_levels)
        self.page_shift = int(shape.page_shift)
        self.n_gfns = int(shape.n_gfns)
        self.level_shift = [int(s) for s in shape.shift]
        self.index_bits = [int(b) for b in shape.bits]
        self.max_leaf_level = min(self.n_levels, 3)
        out = ffi.new("struct kh_mmu **")
        check(lib.kh_mmu_open(out, config), "kh_mmu_open", **self._shape_arguments(config))
        super().__init__(Handle(out[0]), None, 1 << self.page_shift)
        if slots is not None:
            self.set_slots(slots)

    @staticmethod
    def _shape_arguments(config: Any) -> dict[str, int]:
        return {n: getattr(config, n) for n in ("format", "levels", "ipa_bits", "page_shift")}

    def level_pages(self, level: int) -> int:
        """Return how many base pages an entry of a level maps.

        :raises LayoutError: if the table has no such level
        """
        if not 1 <= level <= self.n_levels:
            raise LayoutError(f"level {level}: the table has levels 1 to {self.n_levels}")
        return 1 << (self.level_shift[level] - self.page_shift)

    # Memslots.

    def set_slots(self, slots: MemSlots) -> None:
        """Replace the memslots; ranges that are removed or moved are unmapped.

        Waits until no fault uses the old slots, as KVM's synchronize_srcu() does: no
        fault can map a page again that was unmapped here. Not inside :meth:`epoch`.

        A page of a slot is backed by the frame ``hva >> 12`` (a made-up identity, cut to
        what the format's leaves can hold), so a huge leaf needs hva and gfn aligned alike.

        :raises LayoutError: if a slot does not fit the address space
        """
        for slot in slots:
            if slot.gfn_end > self.n_gfns or slot.as_id >= self.n_as:
                raise LayoutError(f"{slot}: outside the {self.n_gfns:#x} gfns of the table")
        before = list(self._slots or ())
        rows = [self._c_slot(slot) for slot in slots]
        c_slots = ffi.new("struct kh_slot[]", rows)
        with self._handle.use() as mmu:
            # SAFETY: the array is copied before the call returns.
            check(lib.kh_mmu_set_slots(mmu, c_slots, len(rows)), "kh_mmu_set_slots")
        self._slots = slots
        kept = set(slots)
        for slot in before:
            if slot not in kept and not self._only_flags_changed(slot, slots):
                self.unmap(slot.gfn_start, slot.gfn_end, as_id=slot.as_id)

    @staticmethod
    def _only_flags_changed(slot: MemSlot, slots: MemSlots) -> bool:
        """Dirty logging switched on or off keeps the mappings; read-only does not."""
        now = slots.find(slot.gfn_start, slot.as_id)
        return now is not None and (
            (now.gfn_start, now.n_pages, now.hva_start, now.read_only)
            == (slot.gfn_start, slot.n_pages, slot.hva_start, slot.read_only)
        )

    def slot_pfn(self, slot: MemSlot) -> int:
        """Return the 4 KiB frame that backs the first page of a slot."""
        return (slot.hva_start >> 12) & (self.format.address_mask >> 13)

    def _c_slot(self, slot: MemSlot) -> dict[str, int]:
        flags = lib.KH_SLOT_READ_ONLY if slot.read_only else 0
        return {
            "gfn_start": slot.gfn_start,
            "n_pages": slot.n_pages,
            "pfn_start": self.slot_pfn(slot),
            "as_id": slot.as_id,
            "flags": flags | (lib.KH_SLOT_LOG_DIRTY if slot.dirty_log else 0),
            "max_level": self.max_leaf_level if slot.huge else 1,
        }

    def set_dirty_logging(self, slot: int, on: bool, *, as_id: int = 0) -> None:
        """Switch dirty logging of a memslot.

        On: huge leaves are split, dirty state is cleared (where the fault handler keeps
        it, that is write-protection), and later faults map single pages. Off: the leaves
        are unchanged; :meth:`collapse` makes them huge again.

        :raises LayoutError: if there is no such slot
        """
        slots = self._slots or MemSlots()
        found = [s for s in slots if (s.slot, s.as_id) == (slot, as_id)]
        if not found:
            raise LayoutError(f"memslot {slot} of address space {as_id}: no such slot")
        old = found[0]
        self.set_slots(slots.with_slot(old.with_dirty_log(on)))
        if on:
            self.split(old.gfn_start, old.gfn_end, as_id=as_id)
            self.harvest_dirty(old.gfn_start, old.n_pages, as_id=as_id)
            self.flush_remote()

    # Operations on the tables.

    def map(
        self,
        gfn: int,
        pfn: int,
        level: int = 1,
        *,
        n: int = 1,
        write: bool = True,
        young: bool = False,
        dirty: bool = False,
        as_id: int = 0,
    ) -> None:
        """Map ``n`` leaves of a level, one after the other in gfn and pfn.

        :raises IoctlError: ``EEXIST`` if something is mapped there, ``EINVAL`` if gfn or
            pfn are not aligned or out of range, ``ENOMEM`` if the arena is full
        """
        flags = lib.KH_LEAF_WRITE if write else 0
        flags |= lib.KH_LEAF_YOUNG if young else 0
        flags |= lib.KH_LEAF_DIRTY if dirty else 0
        request = ffi.new(
            "struct kh_map *",
            {"gfn": gfn, "pfn": pfn, "as_id": as_id, "level": level, "flags": flags},
        )
        with self._handle.use() as mmu:
            result = lib.kh_mmu_map_many(mmu, request, n)
        check(result, "kh_mmu_map", gfn=gfn, pfn=pfn, level=level, n=n)

    def unmap(self, start: int, end: int, *, as_id: int = 0, defer_flush: bool = False) -> bool:
        """Remove every leaf that overlaps the range; return whether there was one.

        :param defer_flush: raise the dirty mark instead of flushing remote TLBs
        """
        flags = lib.KH_DEFER_FLUSH if defer_flush else 0
        return self._range("kh_mmu_unmap", as_id, start, end, flags)

    def write_protect(self, start: int, end: int, *, as_id: int = 0) -> bool:
        """Take the write permission from every leaf that touches the range."""
        return self._range("kh_mmu_write_protect", as_id, start, end)

    def split(self, start: int, end: int, *, as_id: int = 0) -> bool:
        """Replace huge leaves that touch the range by tables, level by level, down to 1."""
        return self._range("kh_mmu_split", as_id, start, end)

    def collapse(self, gfn: int, level: int, *, as_id: int = 0) -> None:
        """Make one leaf out of the table under ``gfn``; it is young if any leaf was.

        :raises IoctlError: ``EINVAL`` if there is no table, or if its entries are not all
            contiguous, equal leaves of the level below
        """
        with self._handle.use() as mmu:
            result = lib.kh_mmu_collapse(mmu, as_id, gfn, level)
        check(result, "kh_mmu_collapse", gfn=gfn, level=level)

    def test_young(self, start: int, end: int, *, as_id: int = 0) -> bool:
        """Return whether any leaf in the range is young; takes no lock."""
        return self._range("kh_mmu_test_young", as_id, start, end)

    def clear_young(self, start: int, end: int, *, as_id: int = 0) -> bool:
        """Clear the accessed bits of the range; takes no lock and does not flush."""
        return self._range("kh_mmu_clear_young", as_id, start, end)

    def clear_flush_young(self, start: int, end: int, *, as_id: int = 0) -> bool:
        """Do it under the MMU lock held for write, then flush if anything was young."""
        return self._range("kh_mmu_clear_flush_young", as_id, start, end)

    def age(
        self, start: int, end: int, batch_pages: int, *, locked: bool, flush: bool, as_id: int = 0
    ) -> int:
        """Age a range in one of the ways that ``kvmhost bench mmu`` compares.

        :param batch_pages: 1 is a walk from the root for every page
        :param locked: hold the MMU lock for write around every batch
        :param flush: flush remote TLBs once for every young page
        :return: number of young pages
        """
        flags = (lib.KH_AGE_LOCKED if locked else 0) | (lib.KH_AGE_FLUSH if flush else 0)
        with self._handle.use() as mmu:
            found = lib.kh_mmu_age(mmu, as_id, start, end, batch_pages, flags)
        return check(int(found), "kh_mmu_age", start=start, end=end, batch_pages=batch_pages)

    def mark_young(
        self, start: int, n_pages: int, bitmap: Words | None = None, *, as_id: int = 0
    ) -> int:
        """Make leaves young, for a tracker that observes accesses elsewhere.

        :param bitmap: shape ``(ceil(n_pages / 64),)``; None for all pages of the range
        :return: how many leaves were old before
        :raises LayoutError: if the bitmap does not fit
        """
        if bitmap is not None:
            if bitmap.shape != (n_words(n_pages),):
                raise LayoutError(f"mark_young: shape {bitmap.shape} for {n_pages} pages")
            bitmap = np.ascontiguousarray(bitmap, dtype=np.uint64)
        with self._handle.use() as mmu:
            found = lib.kh_mmu_mark_young(mmu, as_id, start, n_pages, words_pointer(bitmap))
        return check(int(found), "kh_mmu_mark_young", start=start, n_pages=n_pages)

    def zap_all(self) -> None:
        """Replace every root by an empty one and tear the old ones down."""
        self._plain("kh_mmu_zap_all")

    def invalidate_roots(self) -> None:
        """Do the first half of :meth:`zap_all`: the old roots stay, invalid, with their tables."""
        self._plain("kh_mmu_invalidate_roots")

    def zap_invalidated_roots(self) -> int:
        """Do the second half; return how many roots it took."""
        return self._plain("kh_mmu_zap_invalidated_roots")

    def release(self) -> None:
        """Zap everything, for good: the memory is going away. Walks meanwhile are safe."""
        self._plain("kh_mmu_release")

    def synchronize(self) -> None:
        """Wait until no walk can hold what was unlinked so far, and free it."""
        self._plain("kh_mmu_synchronize")

    @contextlib.contextmanager
    def epoch(self) -> Iterator[None]:
        """Enter an epoch as a walk does: no table reachable now is freed before the block ends."""
        with self._handle.use() as mmu:
            slot = lib.kh_mmu_epoch_enter(mmu)
            try:
                yield
            finally:
                lib.kh_mmu_epoch_exit(mmu, slot)

    # Accesses and faults.

    def access(self, gfn: int, write: bool = False, *, as_id: int = 0) -> int:
        """Access a page as hardware would; return 0 or the kind of fault.

        1: no leaf; 2: accessed bit clear, and hardware does not set it; 3: a write that
        needs the fault handler.
        """
        with self._handle.use() as mmu:
            return int(lib.kh_mmu_access(mmu, as_id, gfn, write))

    def touch(self, gfn: int, write: bool = False, *, as_id: int = 0) -> None:
        """Access a page, with faults handled from the memslots.

        :raises IoctlError: ``EFAULT`` without a slot, ``EROFS`` for a write to a read-only
            one, ``EAGAIN`` while the page is being invalidated, ``ESHUTDOWN`` after release
        """
        with self._handle.use() as mmu:
            result = lib.kh_mmu_touch(mmu, as_id, gfn, write)
        check(result, "kh_mmu_touch", gfn=gfn, write=write)

    def fault_begin(self) -> int:
        """Start to handle a fault: the invalidation sequence as of now."""
        with self._handle.use() as mmu:
            return int(lib.kh_mmu_fault_begin(mmu))

    def fault_finish(self, gfn: int, seq: int, write: bool = False, *, as_id: int = 0) -> bool:
        """Map the page of a fault; False if an invalidation raced it, so it has to start over.

        :raises IoctlError: as :meth:`touch`
        """
        with self._handle.use() as mmu:
            result = lib.kh_mmu_fault_finish(mmu, as_id, gfn, write, seq)
        if result == -11:  # EAGAIN
            return False
        check(result, "kh_mmu_fault_finish", gfn=gfn, seq=seq)
        return True

    def invalidate_retry(self, gfn: int, seq: int) -> bool:
        """Return whether a fault that began at ``seq`` must start over."""
        with self._handle.use() as mmu:
            return bool(lib.kh_mmu_invalidate_retry(mmu, gfn, seq))

    def invalidate_start(self, ranges: Sequence[tuple[int, int, int]]) -> bool:
        """Begin an invalidation of ``(as_id, start, end)`` ranges: unmap, and block faults."""
        return bool(self._invalidate("kh_mmu_invalidate_start", ranges))

    def invalidate_end(self, ranges: Sequence[tuple[int, int, int]]) -> None:
        """End it.

        :raises IoctlError: ``EINVAL`` if none is in progress
        """
        self._invalidate("kh_mmu_invalidate_end", ranges)

    # TLBs.

    def flush_remote(self) -> None:
        """Make every vCPU empty its TLB before its next access."""
        with self._handle.use() as mmu:
            lib.kh_mmu_flush_remote(mmu)

    def flush_remote_cond(self, wanted: bool) -> bool:
        """Flush if requested or if a flush was deferred; return whether it flushed."""
        with self._handle.use() as mmu:
            return bool(lib.kh_mmu_flush_remote_cond(mmu, wanted))

    # Looking at tables.

    def entry(self, gfn: int, level: int = 1, *, as_id: int = 0) -> int | None:
        """Return the entry for a gfn at a level, in CPU order; None if no table is there."""
        raw = ffi.new("uint64_t *")
        with self._handle.use() as mmu:
            result = lib.kh_mmu_read_entry(mmu, as_id, gfn, level, raw)
        if result == -2:  # ENOENT
            return None
        check(result, "kh_mmu_read_entry", gfn=gfn, level=level)
        return self.format.from_memory(int(raw[0]).to_bytes(8, "little"))

    def leaf(self, gfn: int, *, as_id: int = 0) -> tuple[int, Entry] | None:
        """Return (level, entry) of the leaf that maps a gfn, None if there is none."""
        for level in range(self.n_levels, 0, -1):
            value = self.entry(gfn, level, as_id=as_id)
            if value is None:
                return None
            entry = self.format.decode(value, level)
            if entry.kind == "leaf":
                return level, entry
        return None

    def dump(self, gfn: int, *, as_id: int = 0) -> list[str]:
        """Print the entries from the root to the leaf of a gfn."""
        lines = []
        for level in range(self.n_levels, 0, -1):
            value = self.entry(gfn, level, as_id=as_id)
            if value is None:
                break
            lines.append(self.format.describe(value, level))
        return lines

    def counters(self) -> dict[str, int]:
        """Return the counters of ``struct kh_mmu_stats``, by name."""
        stats = ffi.new("struct kh_mmu_stats *")
        with self._handle.use() as mmu:
            lib.kh_mmu_get_stats(mmu, stats)
        return {name: int(getattr(stats, name)) for name in _STATS}

    def _range(self, name: str, as_id: int, start: int, end: int, *flags: int) -> bool:
        with self._handle.use() as mmu:
            result = getattr(lib, name)(mmu, as_id, start, end, *flags)
        return check(result, name, as_id=as_id, start=start, end=end) > 0

    def _plain(self, name: str) -> int:
        with self._handle.use() as mmu:
            return check(getattr(lib, name)(mmu), name)

    def _invalidate(self, name: str, ranges: Sequence[tuple[int, int, int]]) -> int:
        rows = [{"as_id": a, "gfn_start": s, "n_pages": e - s} for a, s, e in ranges]
        c_ranges = ffi.new("struct kh_segment[]", rows)
        with self._handle.use() as mmu:
            return check(getattr(lib, name)(mmu, c_ranges, len(rows)), name)
