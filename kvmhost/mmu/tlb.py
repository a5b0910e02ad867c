"""A vCPU's TLB: set-associative, with a separate part for huge translations.

It caches that a page was accessed, and that it was written: a hit changes nothing in the
tables. So after a harvest without a flush a page can be used and stay old, until its
translation is flushed or evicted. How often that happens depends on the TLB's size and
the access pattern; it is the cost of not flushing, and part of the harvest's contract.
"""

from __future__ import annotations

import dataclasses

from kvmhost._ffi import ffi, lib
from kvmhost.errors import LayoutError

__all__ = ["Tlb", "TlbGeometry"]


@dataclasses.dataclass(frozen=True)
class TlbGeometry:
    """Sets (powers of two) and ways, of base pages and of huge ones; 0 sets is none.

    The default is about a second-level TLB: 1,536 base pages in 128 sets of 12, 64 huge.
    """

    sets: int = 128
    ways: int = 12
    huge_sets: int = 16
    huge_ways: int = 4


class Tlb:
    """One TLB. Not for several threads at a time, as a vCPU's is not.

    :param table_format: format id of the C core, for the sizes of the levels
    :raises LayoutError: if the geometry is not of powers of two
    """

    def __init__(
        self, geometry: TlbGeometry | None = None, *, table_format: int = 0, page_shift: int = 12
    ) -> None:
        g = self.geometry = geometry or TlbGeometry()
        pointer = lib.kh_tlb_new(g.sets, g.ways, g.huge_sets, g.huge_ways, table_format, page_shift)
        if pointer == ffi.NULL:
            raise LayoutError(f"{g}: sets must be powers of two, with at least one way")
        self._tlb = ffi.gc(pointer, lib.kh_tlb_free)

    def lookup(self, gfn: int, write: bool = False) -> int:
        """Return the level of the cached translation, 0 for a miss.

        A write through a translation that was filled by a read misses: it has to walk, to
        set the dirty bit.
        """
        return int(lib.kh_tlb_lookup(self._tlb, gfn, write))

    def insert(self, gfn: int, level: int = 1, write: bool = False) -> None:
        """Cache a translation; the least recently used one of its set is evicted."""
        lib.kh_tlb_insert(self._tlb, gfn, level, write)

    def flush(self) -> None:
        """Forget everything."""
        lib.kh_tlb_flush(self._tlb)

    def flush_page(self, gfn: int) -> None:
        """Forget the translations of one gfn, of any size."""
        lib.kh_tlb_flush_page(self._tlb, gfn)
