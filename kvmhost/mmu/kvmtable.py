"""Second-stage tables that a KVM has built and goes on changing, walked in that host's memory.

The walkers are those of the models (``_core/mmu_tdp.c``, ``mmu_stage2.c``, ``mmu_radix.c``),
on the memory of a host that is a file here, such as an emulated host of the lab. What differs
from tables of this layer:

- an entry is present if KVM says so: on x86 by a bit of its own, since KVM's MMIO entries have
  hardware's present bit, and part of a generation where other entries have the accessed bit;
- bits are cleared by compare-and-swap only: KVM's frozen entry (0x5a0) contains the accessed
  bits of NPT and EPT, and an atomic and-not would change it;
- the tables above the last level are checked before anything is written. A pointer outside the
  memory, a table that contains itself, a leaf where the format has none, and a radix entry that
  names another index width are errors: a root that is gone may lead anywhere.

Nothing holds off the KVM meanwhile: a table that it frees during a harvest may be read, and, in
principle, written, after it has become something else, since no RCU reaches out of that host. What
is written then is one bit of a word that has all bits of a young leaf. A harvest of a stopped
host excludes it.
"""

from __future__ import annotations

import dataclasses
import errno
from typing import Literal

from kvmhost._ffi import check, ffi, lib
from kvmhost.errors import LayoutError, TableError
from kvmhost.mmu.formats import by_name
from kvmhost.mmu.harvest import Handle, WalkedTable
from kvmhost.mmu.memslots import MemSlots
from kvmhost.mmu.tablemem import TableMemory

__all__ = ["KvmTable", "KvmTableFormat", "TableRoot"]

KvmTableFormat = Literal["npt", "ept", "stage2", "radix"]

_IDS: dict[KvmTableFormat, int] = {
    "npt": lib.KH_FMT_NPT,
    "ept": lib.KH_FMT_EPT,
    "stage2": lib.KH_FMT_STAGE2,
    "radix": lib.KH_FMT_RADIX,
}
#: Where an entry has the address of the next table.
_TABLE_ADDRESS: dict[KvmTableFormat, int] = {
    "npt": 0x000F_FFFF_FFFF_F000,
    "ept": 0x000F_FFFF_FFFF_F000,
    "stage2": 0x0003_FFFF_FFFF_F000,
    "radix": 0x0FFF_FFFF_FFFF_FF00,
}
#: KVM's own bit for "present" in its x86 tables.
_SPTE_MMU_PRESENT = 1 << 11


@dataclasses.dataclass(frozen=True)
class TableRoot:
    """Root of a second-stage table, and the geometry below it.

    :ivar pa: physical address of the root table; of the first of concatenated ones on arm64
    :ivar levels: x86 only: 4 or 5
    :ivar ipa_bits: arm64 only: 32 to 52
    :ivar page_shift: powerpc only: 12 or 16
    """

    table_format: KvmTableFormat
    pa: int
    levels: int = 0
    ipa_bits: int = 0
    page_shift: int = 12

    def __str__(self) -> str:
        shape = {
            "stage2": f"{self.ipa_bits} bits of IPA",
            "radix": f"{1 << self.page_shift >> 10} KiB pages",
        }.get(self.table_format, f"{self.levels} levels")
        return f"{self.table_format} at {self.pa:#x}, {shape}"


class KvmTable(WalkedTable):
    """A table that a KVM built, in the memory of its host.

    :param memory: that host's memory, by physical address
    :param slots: which gfns exist; without it every gfn is taken to exist
    :raises TableError: if the root is unaligned or outside the memory
    :raises LayoutError: if the format has no such geometry
    """

    tracker = "kvmtable"

    def __init__(
        self, memory: TableMemory, root: TableRoot, *, slots: MemSlots | None = None
    ) -> None:
        if root.table_format not in _IDS:
            raise LayoutError(f"table format {root.table_format!r}: need one of {sorted(_IDS)}")
        self.memory, self.root = memory, root
        self.table_format = root.table_format
        config = ffi.new(
            "struct kh_mmu_config *",
            {
                "format": _IDS[root.table_format],
                "levels": root.levels,
                "ipa_bits": root.ipa_bits,
                "page_shift": root.page_shift,
                "flags": lib.KH_MMU_KVM,
            },
        )
        shape = ffi.new("struct kh_mmu_shape *")
        if lib.kh_mmu_shape(config, shape) < 0:
            raise LayoutError(f"no such table: {root}")
        self.n_gfns = int(shape.n_gfns)
        _check_root(memory, root, 8 << int(shape.bits[shape.n_levels]))
        regions = memory.c_regions()
        out = ffi.new("struct kh_mmu **")
        check(
            lib.kh_mmu_open_live(out, config, regions, len(regions), root.pa),
            "kh_mmu_open_live",
            root_pa=root.pa,
        )
        super().__init__(Handle(out[0]), slots, 1 << int(shape.page_shift))
        self.n_levels = int(shape.n_levels)
        self._entries = 1 << int(shape.bits[1])
        self._format = by_name(root.table_format, page_shift=int(shape.page_shift))

    def last_level(self, gfn_start: int, n_pages: int) -> list[tuple[int, int]]:
        """Return (host address, entries) of the last-level tables of a range, for measurements.

        They are whole tables, and those that exist.

        :raises LayoutError: if the format has no such gfns
        """
        found = []
        for gfn in range(gfn_start & -self._entries, gfn_start + n_pages, self._entries):
            entry = self._entry(gfn, 2)
            if entry is None or self._format.decode(entry, 2).kind != "table":
                continue
            pa = entry & _TABLE_ADDRESS[self.root.table_format]
            for start, host, n_bytes in self.memory.regions:
                if start <= pa and pa + 8 * self._entries <= start + n_bytes:
                    found.append((host + pa - start, self._entries))
        return found

    def _entry(self, gfn: int, level: int) -> int | None:
        """Return an entry in CPU order; None if there is no table for it."""
        if not 0 <= gfn < self.n_gfns:
            raise LayoutError(f"gfn {gfn:#x} is outside {self.root}")
        raw = ffi.new("uint64_t *")
        with self._handle.use() as mmu:
            result = lib.kh_mmu_read_entry(mmu, 0, gfn, level, raw)
        if result == -errno.ENOENT:
            return None
        check(result, "kh_mmu_read_entry", gfn=gfn, level=level)
        return self._format.from_memory(int(raw[0]).to_bytes(8, "little"))

    def leaf(self, gfn: int) -> tuple[int, int] | None:
        """Return level and value, in CPU order, of the leaf that maps a gfn; None if none does.

        :raises LayoutError: if the format has no such gfn
        """
        for level in range(self.n_levels, 0, -1):
            value = self._entry(gfn, level)
            if value is None:
                return None
            of_kvm = value & _SPTE_MMU_PRESENT or self.table_format not in ("npt", "ept")
            if of_kvm and self._format.decode(value, level).kind == "leaf":
                return level, value
        return None


def _check_root(memory: TableMemory, root: TableRoot, n_bytes: int) -> None:
    """Check that the root table is aligned, and inside one region.

    :raises TableError: if it is not
    """
    inside = any(pa <= root.pa and root.pa + n_bytes <= pa + n for pa, _, n in memory.regions)
    if root.pa % 4096 or not inside:
        raise TableError(f"root table {root}: unaligned, or outside the host's memory")
