"""Feed what a tracker found into a model table of any format, and harvest it there.

A tracker reports which pages were touched; this module sets their accessed bits in a
table of :mod:`kvmhost.mmu`, as hardware would have set them, and the walker of that
format harvests them. So one guest can be harvested through every format, and the bitmaps
must be equal.

The table maps what a tracker has reported: 4 KiB leaves in blocks of 512 pages, or one
leaf of 2 MiB if a whole block was reported coarse. A huge leaf is split when a later
report distinguishes its pages. The table uses as much memory as page tables: 8 bytes per
page of the blocks that were ever touched (0.2 %), and is created on demand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from kvmhost.bitmap import YoungBitmap, sub_words
from kvmhost.closing import Closing
from kvmhost.memory.guest import GfnRange
from kvmhost.mmu.memslots import MemSlot, MemSlots
from kvmhost.mmu.radix import RadixTable
from kvmhost.mmu.stage2 import Stage2Table
from kvmhost.mmu.table import Mmu
from kvmhost.mmu.tdp import TdpTable
from kvmhost.units import PAGE_BYTES
from kvmhost.vm.names import TABLE_FORMATS, TableFormat, check_name

__all__ = ["Feed"]

_BLOCK = 512
_ABSENT, _SMALL, _HUGE = 0, 1, 2


class Feed(Closing):
    """A model table over a VM's memory slots.

    :param table_format: ``tdp`` is ``npt``
    :raises LayoutError: for another format, or slots that do not fit its address space
    """

    def __init__(self, table_format: TableFormat, regions: Iterable[GfnRange]) -> None:
        check_name("table format", table_format, TABLE_FORMATS, "table_format")
        self.name = "npt" if table_format == "tdp" else table_format
        slots = MemSlots(
            MemSlot(i, r.gfn, r.n_pages, r.guest_address) for i, r in enumerate(regions)
        )
        self._n_blocks = -(-max(slot.gfn_end for slot in slots) // _BLOCK)
        self._blocks = np.zeros(self._n_blocks, dtype=np.uint8)
        # Room for every level in full: unused room uses no memory.
        self.table = _make(self.name, (self._n_blocks + 64) * 2 * PAGE_BYTES)
        self.table.set_slots(slots)
        self._slots = slots

    def feed(self, bitmap: YoungBitmap) -> int:
        """Set the accessed bits of the young pages; return how many leaves became young."""
        for gfn in self._young_blocks(bitmap):
            self._map(gfn, bitmap)
        marked = 0
        for slot_start, n_pages in self._parts(bitmap):
            first = slot_start - bitmap.gfn_start
            words = sub_words(bitmap.words, bitmap.n_pages, first, n_pages)
            marked += self.table.mark_young(slot_start, n_pages, words)
        return marked

    def harvest_via_model(self, bitmap: YoungBitmap) -> YoungBitmap:
        """Feed a harvest and have the walker harvest it: what the format makes of it.

        No page stays young in the table; the tracker defines the window. The provenance names
        the tracker, its window, and the model's format.
        """
        self.feed(bitmap)
        source = dataclasses.replace(bitmap.provenance, table_format=f"{self.name}-model")
        found = self.table.harvest(bitmap.gfn_start, bitmap.n_pages, True, provenance=source)
        if bitmap.coarse is None:
            return found
        # What the tracker reports as coarse is coarse, for any size of the leaf.
        coarse = bitmap.coarse if found.coarse is None else found.coarse | bitmap.coarse
        return dataclasses.replace(found, coarse=coarse)

    def close(self) -> None:
        """Free the table. Idempotent."""
        self.table.close()

    def _parts(self, bitmap: YoungBitmap) -> Iterator[tuple[int, int]]:
        for piece in self._slots.in_gfn_range(bitmap.gfn_start, bitmap.n_pages):
            yield piece.gfn_start, piece.n_pages

    def _young_blocks(self, bitmap: YoungBitmap) -> Iterator[int]:
        """Yield the first gfns of blocks that contain a young page."""
        blocks = np.unique(bitmap.gfns() // _BLOCK)
        for block in blocks[blocks < self._n_blocks]:
            yield int(block) * _BLOCK

    def _map(self, gfn: int, bitmap: YoungBitmap) -> None:
        """Map the leaves of a block so that they can represent the bitmap."""
        block = gfn // _BLOCK
        whole = self._is_one(gfn, bitmap)
        if self._blocks[block] == _ABSENT and whole:
            self.table.map(gfn, gfn, 2)
            self._blocks[block] = _HUGE
        elif self._blocks[block] == _ABSENT:
            # One slot may end in a block and another begin there.
            for piece in self._slots.in_gfn_range(gfn, _BLOCK):
                self.table.map(piece.gfn_start, piece.gfn_start, 1, n=piece.n_pages)
            self._blocks[block] = _SMALL
        elif self._blocks[block] == _HUGE and not whole:
            self.table.split(gfn, gfn + _BLOCK)
            self._blocks[block] = _SMALL

    def _is_one(self, gfn: int, bitmap: YoungBitmap) -> bool:
        """Return whether a whole block is young and coarse, and lies in one slot."""
        first, end = gfn - bitmap.gfn_start, gfn + _BLOCK - bitmap.gfn_start
        if bitmap.coarse is None or first < 0 or end > bitmap.n_pages:
            return False
        pieces = list(self._slots.in_gfn_range(gfn, _BLOCK))
        if len(pieces) != 1 or pieces[0].n_pages != _BLOCK:
            return False
        coarse = sub_words(bitmap.coarse & bitmap.words, bitmap.n_pages, first, _BLOCK)
        return bool((coarse == np.uint64(2**64 - 1)).all())


def _make(name: str, arena_bytes: int) -> Mmu:
    if name == "stage2":
        return Stage2Table(arena_bytes=arena_bytes)
    if name == "radix":
        return RadixTable(arena_bytes=arena_bytes)
    return TdpTable(name, arena_bytes=arena_bytes)
