"""The port by which a guest declares pages free, one list of ranges at a time.

The guest fills a page with ranges and writes its gfn to the port. The list,
little-endian 64-bit words: number of ranges; then, for the host to fill in, pages
dropped and pages kept; a reserved word; then first gfn and number of pages of each
range. From the write on a dropped page reads as zeros, whatever it held and wherever
it was. A guest can only free its own memory: a range that is not wholly in one of its
regions counts as kept, and so does a page that the host has pinned. So do ranges after
those that make up more pages than the guest has: a list that names pages over and over
would keep the vCPU's thread from anything else.
"""

from __future__ import annotations

import struct
import typing

from kvmhost.errors import LayoutError, LostPageError
from kvmhost.memory.layout import PAGE_BYTES, PAGE_SHIFT

if typing.TYPE_CHECKING:
    from kvmhost.machine.base import BaseMachine

__all__ = ["MAX_RANGES", "FreeList"]

_HEAD = struct.Struct("<4Q")
_RANGE = struct.Struct("<2Q")
MAX_RANGES = (PAGE_BYTES - _HEAD.size) // _RANGE.size


class FreeList:
    """The device behind the port; reads give all ones, as where there is nothing."""

    def __init__(self, machine: BaseMachine) -> None:
        self._machine = machine
        self.lists = 0
        self.dropped_pages = 0
        self.kept_pages = 0

    def read(self, offset: int, size: int) -> int:
        """Return all ones."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Work off the list at gfn ``value``; a list outside memory is passed over.

        :raises LostPageError: if the list itself cannot be given back by the store
        """
        try:
            page = self._machine.memory.view(value << PAGE_SHIFT, PAGE_BYTES)
        except LayoutError:
            return
        self._check(value)
        with page:
            n_ranges, _, _, reserved = _HEAD.unpack_from(page)
            dropped = kept = 0
            for i in range(min(n_ranges, MAX_RANGES)):
                gfn, n_pages = _RANGE.unpack_from(page, _HEAD.size + i * _RANGE.size)
                room = self._machine.memory.n_pages - dropped
                went = self._drop(gfn, n_pages) if n_pages <= room else 0
                dropped, kept = dropped + went, kept + n_pages - went
            # The list itself may have been in a range: this write is then its first touch.
            _HEAD.pack_into(page, 0, n_ranges, dropped, min(kept, (1 << 64) - 1), reserved)
        self.lists += 1
        self.dropped_pages += dropped
        self.kept_pages += kept

    def _check(self, gfn: int) -> None:
        """Bring the list's page back: a touch of one that is lost would end the process."""
        if not self._machine.has_pager:
            return
        pager = self._machine.pager
        pager.restore(gfn)
        if pager.state(gfn).name == "LOST":
            raise LostPageError([gfn], pager.lost_reason())

    def _drop(self, gfn: int, n_pages: int) -> int:
        try:
            return self._machine.drop(gfn, n_pages)
        except LayoutError:
            return 0
