"""Table entries of four formats: encode, decode, and print them.

Written from the manuals, independently of the C core, so that each checks the other.
Values are in CPU order; :meth:`Format.to_memory` returns the bytes as stored in a table.

Levels count from 1, the base page, on every format. Native numbers: x86 1 to 4 (or 5) as
here; stage 2 counts down, 3 is the base page; radix names them PTE, PMD, PUD, PGD.
"""

from __future__ import annotations

import dataclasses

from kvmhost.errors import LayoutError

__all__ = ["EPT", "NPT", "STAGE2", "STAGE2_SW", "Entry", "Format", "Radix", "Stage2", "by_name"]

_FRAME = 12


def _bit(n: int) -> int:
    return 1 << n


@dataclasses.dataclass(frozen=True)
class Entry:
    """A decoded entry.

    ``kind`` is ``"absent"``, ``"frozen"`` (absent, locked by another thread), ``"leaf"`` or
    ``"table"``; ``address`` the byte address of the page or the next table.
    """

    kind: str
    address: int = 0
    write: bool = False
    young: bool = False
    dirty: bool = False

    @property
    def pfn(self) -> int:
        """The 4 KiB frame that contains the address."""
        return self.address >> _FRAME


class Format:
    """One layout. Subclasses define the positions of the bits.

    :cvar bits: names of the bits that :meth:`describe` prints, by number
    :cvar frozen: value of a frozen entry, None if the format has none
    """

    name = "none"
    big_endian = False
    address_mask = 0x000F_FFFF_FFFF_F000
    table_mask = 0x000F_FFFF_FFFF_F000
    accessed = 0
    dirty = 0
    dirty_needs_write = False
    frozen: int | None = None
    bits: dict[int, str] = {}  # noqa: RUF012 (a constant of each subclass)

    def leaf(
        self,
        pfn: int,
        level: int = 1,
        *,
        write: bool = True,
        young: bool = False,
        dirty: bool = False,
    ) -> int:
        """Encode a leaf that maps the 4 KiB frame ``pfn`` first.

        Dirty state of stage 2 is part of the write permission: a read-only leaf has none.

        :raises LayoutError: if the frame does not fit the format
        """
        address = pfn << _FRAME
        if address & ~self.address_mask or pfn < 0:
            raise LayoutError(f"{self.name}: frame {pfn:#x} has bits that a leaf cannot hold")
        value = address | self._leaf_bits(level, write)
        if young:
            value |= self.accessed
        if dirty and (write or not self.dirty_needs_write):
            value |= self.dirty
        return value

    def table(self, pa: int, level: int) -> int:
        """Encode an entry of ``level`` that points to a table at ``pa``.

        :raises LayoutError: if the address does not fit the format
        """
        if pa & ~self.table_mask or pa < 0:
            raise LayoutError(f"{self.name}: no table can be at {pa:#x}")
        return pa | self._table_bits(level)

    def decode(self, value: int, level: int) -> Entry:
        """Decode an entry of a level."""
        if not self._present(value):
            return Entry("frozen" if value == self.frozen else "absent")
        if level > 1 and not self._is_leaf(value, level):
            return Entry("table", value & self.table_mask)
        if not self._is_leaf(value, level):
            return Entry("absent")
        return Entry(
            "leaf",
            value & self.address_mask,
            self._writable(value),
            bool(value & self.accessed),
            bool(value & self.dirty),
        )

    def describe(self, value: int, level: int) -> str:
        """Format an entry as text: kind, address, and the names of its bits."""
        entry = self.decode(value, level)
        where = "" if entry.kind in ("absent", "frozen") else f" -> {entry.address:#x}"
        covered = (self.table_mask if entry.kind == "table" else self.address_mask) if where else 0
        names = []
        for n in range(64):
            if value & ~covered & _bit(n):
                names.append(self.bits.get(n, f"bit{n}"))
        return f"{self.name} level {level} {entry.kind}{where} [{' '.join(names)}]"

    def to_memory(self, value: int) -> bytes:
        """Return the eight bytes of an entry as a table holds them."""
        return value.to_bytes(8, "big" if self.big_endian else "little")

    def from_memory(self, raw: bytes) -> int:
        """Read an entry from the eight bytes that a table holds."""
        return int.from_bytes(raw, "big" if self.big_endian else "little")

    def _leaf_bits(self, level: int, write: bool) -> int:
        raise NotImplementedError

    def _table_bits(self, level: int) -> int:
        raise NotImplementedError

    def _present(self, value: int) -> bool:
        raise NotImplementedError

    def _is_leaf(self, value: int, level: int) -> bool:
        raise NotImplementedError

    def _writable(self, value: int) -> bool:
        raise NotImplementedError


class _X86(Format):
    """What NPT and EPT share: bit 7 makes an entry above level 1 a leaf."""

    frozen = 0x480

    def _is_leaf(self, value: int, level: int) -> bool:
        return level == 1 or bool(value & _bit(7))

    def _writable(self, value: int) -> bool:
        return bool(value & _bit(1))


class Npt(_X86):
    """Nested paging, which is the long-mode layout: AMD64 APM vol. 2, 5.4 and 15.25.5.

    Bits 9 and 10 are KVM's host- and MMU-writable (DEFAULT_SPTE_*_WRITEABLE, spte.h).
    """

    name = "npt"
    accessed = _bit(5)
    dirty = _bit(6)
    bits = {  # noqa: RUF012
        0: "P", 1: "RW", 2: "US", 3: "PWT", 4: "PCD", 5: "A", 6: "D", 7: "PS", 8: "G",
        9: "host-writable", 10: "mmu-writable", 11: "AVL11", 63: "NX",
    }  # fmt: skip

    def _leaf_bits(self, level: int, write: bool) -> int:
        return 0b101 | (0b110_0000_0010 if write else 0) | (_bit(7) if level > 1 else 0)

    def _table_bits(self, level: int) -> int:
        return 0b10_0111

    def _present(self, value: int) -> bool:
        return bool(value & 1)


class Ept(_X86):
    """Extended page tables: Intel SDM vol. 3C, 29.3.2 (formats), 29.3.5 (A and D).

    Bits 57 and 58 are KVM's host- and MMU-writable (EPT_SPTE_*_WRITABLE, spte.h).
    """

    name = "ept"
    accessed = _bit(8)
    dirty = _bit(9)
    bits = {  # noqa: RUF012
        0: "R", 1: "W", 2: "X", 3: "MT0", 4: "MT1", 5: "MT2", 6: "IPAT", 7: "PS", 8: "A",
        9: "D", 10: "XU", 57: "host-writable", 58: "mmu-writable", 63: "SVE",
    }  # fmt: skip

    def _leaf_bits(self, level: int, write: bool) -> int:
        # Readable, executable, write-back (6), ignoring the guest's PAT.
        value = 0b101 | 6 << 3 | _bit(6)
        if write:
            value |= _bit(1) | _bit(57) | _bit(58)
        return value | (_bit(7) if level > 1 else 0)

    def _table_bits(self, level: int) -> int:
        return 0b111 | _bit(8)

    def _present(self, value: int) -> bool:
        return bool(value & 0b111)


class Stage2(Format):
    """VMSAv8-64 stage 2, 4 KiB granule: Arm ARM DDI 0487, D8.3; kvm_pgtable.h.

    With hardware management (FEAT_HAFDBS), DBM (bit 51) means that a write may set
    S2AP[1] (bit 7), which is then the dirty state. Without it, software bit 55 replaces
    DBM.
    """

    name = "stage2"
    address_mask = 0x0000_FFFF_FFFF_F000
    table_mask = 0x0000_FFFF_FFFF_F000
    accessed = _bit(10)
    dirty = _bit(7)
    dirty_needs_write = True
    frozen = _bit(10)  # KVM_INVALID_PTE_LOCKED
    bits = {  # noqa: RUF012
        0: "valid", 1: "type", 2: "MemAttr0", 3: "MemAttr1", 4: "MemAttr2", 5: "MemAttr3",
        6: "S2AP-R", 7: "S2AP-W", 8: "SH0", 9: "SH1", 10: "AF", 51: "DBM", 52: "contiguous",
        53: "XN0", 54: "XN1", 55: "SW0", 56: "SW1", 57: "SW2", 58: "SW3",
    }  # fmt: skip

    def __init__(self, *, sw_access: bool = False) -> None:
        self.sw_access = sw_access
        self.may_write = _bit(55 if sw_access else 51)

    def _leaf_bits(self, level: int, write: bool) -> int:
        # Normal memory (MT_S2_NORMAL, 0xf), readable, inner shareable (3).
        value = 1 | (0b10 if level == 1 else 0) | 0xF << 2 | _bit(6) | 3 << 8
        return value | (self.may_write if write else 0)

    def _table_bits(self, level: int) -> int:
        return 0b11

    def _present(self, value: int) -> bool:
        return bool(value & 1)

    def _is_leaf(self, value: int, level: int) -> bool:
        return bool(value & 0b10) == (level == 1)

    def _writable(self, value: int) -> bool:
        return bool(value & (_bit(7) | self.may_write))


class Radix(Format):
    """Partition-scoped radix tables: Power ISA 3.0B, book III, 5.7.10.2; book3s/64/radix.h.

    Entries are big-endian. A directory entry holds the index width of the next table.

    :param page_shift: 12 or 16, log2 of the base page
    """

    name = "radix"
    big_endian = True
    table_mask = 0x0FFF_FFFF_FFFF_FF00  # RPDB_MASK
    accessed = 0x100  # _PAGE_ACCESSED
    dirty = 0x080  # _PAGE_DIRTY
    bits = {  # noqa: RUF012
        0: "X", 1: "W", 2: "R", 3: "privileged", 4: "ATT0", 5: "ATT1", 7: "C", 8: "A",
        62: "leaf", 63: "present",
    }  # fmt: skip

    def __init__(self, page_shift: int = 12) -> None:
        if page_shift not in (12, 16):
            raise LayoutError(f"radix: base page of 2**{page_shift} bytes; need 12 or 16")
        self.page_shift = page_shift
        self.index_bits = {1: 21 - page_shift, 2: 9, 3: 9, 4: 13}
        # PTE_RPN_MASK with RPAGE_PA_MAX 56
        self.address_mask = ((1 << 56) - 1) & ~((1 << page_shift) - 1)

    def _leaf_bits(self, level: int, write: bool) -> int:
        return _bit(63) | _bit(62) | 0b101 | (0b010 if write else 0)

    def _table_bits(self, level: int) -> int:
        return _bit(63) | self.index_bits[level - 1]

    def _present(self, value: int) -> bool:
        return bool(value & _bit(63))

    def _is_leaf(self, value: int, level: int) -> bool:
        return bool(value & _bit(62))

    def _writable(self, value: int) -> bool:
        return bool(value & 0b010)


NPT = Npt()
EPT = Ept()
STAGE2 = Stage2()
STAGE2_SW = Stage2(sw_access=True)


def by_name(name: str, *, page_shift: int = 12, sw_access: bool = False) -> Format:
    """Return the format of a name: ``npt``, ``ept``, ``stage2`` or ``radix``.

    :raises LayoutError: if there is none of that name
    """
    if name == "radix":
        return Radix(page_shift)
    if name == "stage2":
        return STAGE2_SW if sw_access else STAGE2
    for found in (NPT, EPT):
        if found.name == name:
            return found
    raise LayoutError(f"table format {name!r}: need npt, ept, stage2 or radix")
