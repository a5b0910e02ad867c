"""Two-dimensional paging on x86: tables in the layouts of NPT and EPT.

The walk is ``struct tdp_iter`` of ``arch/x86/kvm/mmu/tdp_iter.[ch]``: pre-order, with a
snapshot of each entry, down to a minimum level, restarted from the root after a yield
(``_core/mmu_tdp.c``). Departures from the kernel:

- last-level tables are harvested as runs of entries instead of being stepped through;
- the walk may leave its epoch, not a lock, and only when table pages wait for it;
- the frozen entry is 0x480, not 0x5a0, which contains the accessed bits of both layouts;
- huge leaves lose their accessed bit by compare-and-swap (and-not could hit the bit of a
  table that took the leaf's place);
- a fault never replaces a table by a huge leaf; :meth:`~kvmhost.mmu.table.Mmu.collapse` does;
- tables that became empty stay until their root is freed, as in tdp_mmu_zap_leafs();
- access tracking without A/D bits, MMIO entries and PAE are not modelled;
- "present" is what hardware sees (bit 0; any of R, W, X), not a software bit, since the
  same walk reads tables that a guest owns;
- a pointer outside the table memory is counted and skipped: live tables are not trusted.
"""

from __future__ import annotations

from typing import Any

from kvmhost._ffi import check, ffi, lib
from kvmhost.errors import LayoutError
from kvmhost.memory.guest import GuestMemory
from kvmhost.mmu.harvest import Handle, WalkedTable
from kvmhost.mmu.memslots import MemSlot, MemSlots
from kvmhost.mmu.table import Mmu
from kvmhost.mmu.tablemem import TableMemory
from kvmhost.units import PAGE_BYTES

__all__ = ["LiveTable", "TdpTable"]

_FORMATS = {"npt": lib.KH_FMT_NPT, "ept": lib.KH_FMT_EPT}


class TdpTable(Mmu):
    """A tdp MMU: 4 levels (48 bits) or 5 (57 bits), in NPT or EPT layout.

    A bit of a last-level entry is cleared by atomic and-not, which is enough: such an entry
    is a leaf or absent, never a table, and absent entries do not hold the bit.

    :param layout: ``"npt"`` or ``"ept"``; the rest as :class:`~kvmhost.mmu.table.Mmu`
    """

    def __init__(self, layout: str = "npt", *, levels: int = 4, **fields: Any) -> None:
        if layout not in _FORMATS:
            raise LayoutError(f"tdp layout {layout!r}: need one of {sorted(_FORMATS)}")
        super().__init__(layout, levels=levels, **fields)


class LiveTable(WalkedTable):
    """A table that another component owns and hardware changes, walked in place.

    The usual case: a guest's own tables, laid out by the VMM in guest memory, with the
    guest's CR3 as root. A "gfn" is then a page number of the guest's linear addresses.

    Hardware may set bits at any time. A guest that rewrites its tables meanwhile may find
    the accessed bit cleared in an entry that has just replaced a young one; memory
    outside the guest cannot be reached.

    :param memory: where tables may lie
    :param root_pa: physical address of the root table
    :param levels: 4 or 5
    :param table_format: ``"npt"`` (which is also the layout of long-mode tables) or ``"ept"``
    :param slots: which gfns exist, and their hva for :meth:`test_clear_young`; without it
        every gfn is taken to exist
    :raises LayoutError: if the root is unaligned or outside the memory
    """

    tracker = "guestpt"

    @classmethod
    def of_guest(cls, memory: GuestMemory, root_gpa: int) -> LiveTable:
        """Open the tables of a guest in its own memory, with its regions as slots."""
        regions = memory.regions
        tables = TableMemory([(r.gpa, r.alias_address, r.n_bytes) for r in regions], memory)
        slots = MemSlots(
            MemSlot(i, r.gfn, r.n_pages, r.guest_address) for i, r in enumerate(regions)
        )
        return cls(tables, root_gpa, slots=slots)

    def __init__(
        self,
        memory: TableMemory,
        root_pa: int,
        *,
        levels: int = 4,
        table_format: str = "npt",
        slots: MemSlots | None = None,
    ) -> None:
        if table_format not in _FORMATS:
            raise LayoutError(f"table format {table_format!r}: need one of {sorted(_FORMATS)}")
        if root_pa % PAGE_BYTES or root_pa not in memory:
            raise LayoutError(f"root table at {root_pa:#x} is unaligned or outside the memory")
        self.memory = memory
        self.table_format = table_format
        config = ffi.new(
            "struct kh_mmu_config *", {"format": _FORMATS[table_format], "levels": levels}
        )
        regions = memory.c_regions()
        out = ffi.new("struct kh_mmu **")
        check(
            lib.kh_mmu_open_live(out, config, regions, len(regions), root_pa),
            "kh_mmu_open_live",
            root_pa=root_pa,
            levels=levels,
        )
        super().__init__(Handle(out[0]), slots, PAGE_BYTES)
