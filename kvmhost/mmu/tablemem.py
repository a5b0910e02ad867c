"""Table memory: the host bytes that back a physical address in a table entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvmhost._ffi import ffi
from kvmhost.errors import LayoutError
from kvmhost.units import PAGE_BYTES

__all__ = ["TableMemory"]


class TableMemory:
    """Regions of memory that tables may lie in, for walkers to check addresses against.

    :param regions: ``(pa_start, host_address, n_bytes)`` of each region; starts are
        multiples of 4096
    :param owner: what keeps the host mapping alive; referenced as long as this object
    :raises LayoutError: if a region is empty, unaligned, wraps around, or overlaps another
    """

    def __init__(self, regions: Sequence[tuple[int, int, int]], owner: object = None) -> None:
        self.regions = sorted((int(pa), int(host), int(n)) for pa, host, n in regions)
        self.owner = owner
        if not self.regions:
            raise LayoutError("table memory: no regions")
        last_end = 0
        for pa, host, n_bytes in self.regions:
            if pa % PAGE_BYTES or host % PAGE_BYTES or n_bytes <= 0 or host <= 0:
                raise LayoutError(
                    f"table memory: region pa={pa:#x} host={host:#x} n_bytes={n_bytes:#x} is "
                    f"empty or not a multiple of {PAGE_BYTES}"
                )
            if pa < last_end or pa + n_bytes > 2**64 or host + n_bytes > 2**64:
                raise LayoutError(
                    f"table memory: region [{pa:#x}, {pa + n_bytes:#x}) overlaps another or wraps"
                )
            last_end = pa + n_bytes

    def c_regions(self) -> Any:
        """Return the regions as a C array of ``struct kh_region``."""
        # SAFETY: the addresses are those of `owner`, which outlives every table over this memory.
        return ffi.new(
            "struct kh_region[]",
            [{"pa_start": pa, "host_address": host, "n_bytes": n} for pa, host, n in self.regions],
        )

    def __contains__(self, pa: int) -> bool:
        return any(start <= pa < start + n for start, _, n in self.regions)
