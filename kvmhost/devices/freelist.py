"""The port by which a guest declares pages free, one list of ranges at a time.

The guest fills a page with ranges and writes its gfn to the port. The list,
little-endian 64-bit words: number of ranges; then, for the host to fill in, pages
dropped and pages kept; a reserved word; then first gfn and number of pages of each
range. After the write a dropped page reads as zeros, whether it was resident or
evicted. A guest can only free its own memory: a range that is not wholly in one of its
regions counts as kept, and so does a page that the host has pinned. So do ranges after
those that make up more pages than the guest has: a list that repeats pages
would block the vCPU's thread.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from kvmhost.errors import LayoutError
from kvmhost.memory.guest import GuestMemory
from kvmhost.units import PAGE_BYTES, PAGE_SHIFT

__all__ = ["MAX_RANGES", "FreeList"]

_HEAD = struct.Struct("<4Q")
_RANGE = struct.Struct("<2Q")
MAX_RANGES = (PAGE_BYTES - _HEAD.size) // _RANGE.size


class FreeList:
    """The device behind the port; reads return all ones, as without a device.

    :param drop: discards ``n`` pages from a gfn on and returns how many; raises
        ``LayoutError`` for a range that is not in one region
    :param fault_in: restores a page before it is read
    """

    def __init__(
        self,
        memory: GuestMemory,
        drop: Callable[[int, int], int],
        fault_in: Callable[[int], None],
    ) -> None:
        self._memory, self._drop, self._fault_in = memory, drop, fault_in
        self.lists = 0
        self.dropped_pages = 0
        self.kept_pages = 0

    def read(self, offset: int, size: int) -> int:
        """Return all ones."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Process the list at gfn ``value``; a list outside memory is ignored.

        :raises LostPageError: if the store cannot restore the page of the list itself
        """
        try:
            page = self._memory.view(value << PAGE_SHIFT, PAGE_BYTES)
        except LayoutError:
            return
        self._fault_in(value)
        with page:
            n_ranges, _, _, reserved = _HEAD.unpack_from(page)
            dropped = kept = 0
            for i in range(min(n_ranges, MAX_RANGES)):
                gfn, n_pages = _RANGE.unpack_from(page, _HEAD.size + i * _RANGE.size)
                room = self._memory.n_pages - dropped
                count = self._dropped(gfn, n_pages) if n_pages <= room else 0
                dropped, kept = dropped + count, kept + n_pages - count
            # The list itself may have been in a range: this write is then its first touch.
            _HEAD.pack_into(page, 0, n_ranges, dropped, min(kept, (1 << 64) - 1), reserved)
        self.lists += 1
        self.dropped_pages += dropped
        self.kept_pages += kept

    def _dropped(self, gfn: int, n_pages: int) -> int:
        try:
            return self._drop(gfn, n_pages)
        except LayoutError:
            return 0
