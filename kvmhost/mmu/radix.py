"""Radix tables on powerpc: a lookup for each gfn, entries big-endian.

The walk is ``find_kvm_secondary_pte()`` of ``arch/powerpc/kvm/book3s_64_mmu_radix.c``:
from the root to one gfn, returning the entry and its size (``_core/mmu_radix.c``). A hole
has a size as well, and a loop over gfns must advance by it; the loop proposed in 2023
read the size of the previous entry. Departures from the kernel:

- a lookup that ends in a last-level table is used for the rest of that table's entries;
- faults take the MMU lock for write, as the kernel takes its spinlock; the lock is never
  taken for read;
- R and C are set by hardware or by the fault handler, as configured; partition-table setup, the
  nested (pseries) case and HPT are not modelled.

With 64 KiB base pages a gfn counts 64 KiB, and a pfn still counts 4 KiB frames.
"""

from __future__ import annotations

from typing import Any

from kvmhost.mmu.table import Mmu

__all__ = ["RadixTable"]


class RadixTable(Mmu):
    """A partition-scoped radix table: index widths 13-9-9-9, or 13-9-9-5 over 64 KiB pages.

    The bit is cleared by compare-and-swap of the big-endian value: only a leaf with the
    bit set is exchanged for one without it, regardless of other changes in between.

    :param page_shift: 12 or 16
    :param hardware_access: hardware sets R and C; without, the fault handler does
    """

    def __init__(
        self, page_shift: int = 12, *, hardware_access: bool = True, **fields: Any
    ) -> None:
        super().__init__("radix", page_shift=page_shift, sw_access=not hardware_access, **fields)
