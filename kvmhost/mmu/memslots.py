"""Memslots: which gfns exist, and where in the host's address space they lie.

A set of slots is an immutable snapshot: a walk keeps the snapshot that it started with,
and a change creates a new one (KVM's ``struct kvm_memslots`` under SRCU). Lookup by hva
goes through an interval structure, since slots may overlap there: slots sorted by start,
with the largest end of every subtree of the implied balanced binary tree. Ends may be
2**64.

Departure from the kernel: there, two copies of an rbtree are swapped; here a change
costs O(n log n) and a lookup O(log n + hits).
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator

from kvmhost.errors import LayoutError
from kvmhost.units import PAGE_BYTES

__all__ = ["MemSlot", "MemSlots", "Piece"]

TOP = 1 << 64


@dataclasses.dataclass(frozen=True)
class MemSlot:
    """One slot: ``n_pages`` guest pages from ``gfn_start``, at ``hva_start`` in the host.

    ``slot`` is the number that the owner assigned; ``as_id`` the address space (1 is
    system management mode on x86).
    ``huge`` allows leaves larger than a page.
    """

    slot: int
    gfn_start: int
    n_pages: int
    hva_start: int
    as_id: int = 0
    read_only: bool = False
    dirty_log: bool = False
    huge: bool = True

    def with_dirty_log(self, on: bool) -> MemSlot:
        """Return the slot with dirty logging on or off."""
        return dataclasses.replace(self, dirty_log=on)

    @property
    def gfn_end(self) -> int:
        """The gfn after the last one."""
        return self.gfn_start + self.n_pages


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a slot that a range covers; ``index`` is its first page, from the range's start."""

    slot: MemSlot
    gfn_start: int
    n_pages: int
    index: int


class MemSlots:
    """A snapshot of all slots.

    :param page_bytes: size of a guest page, as the tables have it
    :raises LayoutError: if a slot is empty, unaligned or leaves the 64-bit space, if
        two slots overlap in gfn, or if a slot number occurs twice in an address space
    """

    def __init__(self, slots: Iterable[MemSlot] = (), *, page_bytes: int = PAGE_BYTES) -> None:
        self.page_bytes = page_bytes
        self._by_gfn = sorted(slots, key=lambda s: (s.as_id, s.gfn_start))
        self._gfn_keys = [(s.as_id, s.gfn_start) for s in self._by_gfn]
        self._check()
        self._by_hva = sorted(self._by_gfn, key=lambda s: s.hva_start)
        self._max_end = [0] * len(self._by_hva)
        self._build(0, len(self._by_hva))

    def __iter__(self) -> Iterator[MemSlot]:
        return iter(self._by_gfn)

    def __len__(self) -> int:
        return len(self._by_gfn)

    def with_slot(self, slot: MemSlot) -> MemSlots:
        """Return the set with a slot added, or changed if its number is taken."""
        return MemSlots([*self._others(slot.slot, slot.as_id), slot], page_bytes=self.page_bytes)

    def without(self, slot: int, as_id: int = 0) -> MemSlots:
        """Return the set without a slot.

        :raises LayoutError: if there is no such slot
        """
        others = self._others(slot, as_id)
        if len(others) == len(self):
            raise LayoutError(f"memslot {slot} of address space {as_id}: no such slot")
        return MemSlots(others, page_bytes=self.page_bytes)

    def find(self, gfn: int, as_id: int = 0) -> MemSlot | None:
        """Return the slot that contains a gfn."""
        at = bisect.bisect_right(self._gfn_keys, (as_id, gfn)) - 1
        if at < 0:
            return None
        slot = self._by_gfn[at]
        return slot if slot.as_id == as_id and gfn < slot.gfn_end else None

    def in_gfn_range(self, gfn_start: int, n_pages: int, as_id: int = 0) -> Iterator[Piece]:
        """Yield the parts of slots in ``[gfn_start, gfn_start + n_pages)``, ascending."""
        end = gfn_start + n_pages
        at = max(bisect.bisect_right(self._gfn_keys, (as_id, gfn_start)) - 1, 0)
        for slot in self._by_gfn[at:]:
            if (slot.as_id, slot.gfn_start) >= (as_id, end):
                return
            first, last = max(slot.gfn_start, gfn_start), min(slot.gfn_end, end)
            if slot.as_id == as_id and first < last:
                yield Piece(slot, first, last - first, first - gfn_start)

    def in_hva_range(self, start: int, end: int) -> Iterator[Piece]:
        """Yield the parts of slots in ``[start, end)`` of hva, of every address space.

        An ``end`` of 0 is the top of the address space, as a C caller's overflow gives it.
        Pages that the range covers partly count as covered, as in the kernel.
        """
        end = end or TOP
        first_page = start // self.page_bytes
        for slot in self._overlapping(0, len(self._by_hva), start, end):
            lo = max(start, slot.hva_start)
            hi = min(end, self._hva_end(slot))
            first = (lo - slot.hva_start) // self.page_bytes
            last = -(-(hi - slot.hva_start) // self.page_bytes)
            index = (slot.hva_start // self.page_bytes) + first - first_page
            yield Piece(slot, slot.gfn_start + first, last - first, index)

    def _others(self, number: int, as_id: int) -> list[MemSlot]:
        return [s for s in self._by_gfn if (s.slot, s.as_id) != (number, as_id)]

    def _hva_end(self, slot: MemSlot) -> int:
        return slot.hva_start + slot.n_pages * self.page_bytes

    def _check(self) -> None:
        numbers = set()
        before: MemSlot | None = None
        for slot in self._by_gfn:
            bad = slot.n_pages <= 0 or slot.gfn_start < 0 or slot.hva_start % self.page_bytes
            if bad or self._hva_end(slot) > TOP or slot.gfn_end * self.page_bytes > TOP:
                raise LayoutError(f"{slot}: empty, unaligned, or past the end of 64 bits")
            same = before is not None and before.as_id == slot.as_id
            if same and before is not None and before.gfn_end > slot.gfn_start:
                raise LayoutError(f"{slot}: overlaps {before}")
            numbers.add((slot.slot, slot.as_id))
            before = slot
        if len(numbers) != len(self._by_gfn):
            raise LayoutError("memslots: a slot number is given twice")

    def _build(self, lo: int, hi: int) -> int:
        """Fill in the largest end of the subtree [lo, hi), whose root is its middle."""
        if lo >= hi:
            return 0
        mid = (lo + hi) // 2
        end = max(self._hva_end(self._by_hva[mid]), self._build(lo, mid), self._build(mid + 1, hi))
        self._max_end[mid] = end
        return end

    def _overlapping(self, lo: int, hi: int, start: int, end: int) -> Iterator[MemSlot]:
        if lo >= hi:
            return
        mid = (lo + hi) // 2
        if self._max_end[mid] <= start:
            return
        yield from self._overlapping(lo, mid, start, end)
        slot = self._by_hva[mid]
        if slot.hva_start >= end:
            return
        if self._hva_end(slot) > start:
            yield slot
        yield from self._overlapping(mid + 1, hi, start, end)
