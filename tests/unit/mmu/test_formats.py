"""Entries of the four formats, against values worked out from manuals and headers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhost._ffi import lib
from kvmhost.errors import LayoutError
from kvmhost.mmu.formats import EPT, NPT, STAGE2, STAGE2_SW, Radix, by_name
from kvmhost.mmu.radix import RadixTable
from kvmhost.mmu.stage2 import Stage2Table
from kvmhost.mmu.table import Mmu
from kvmhost.mmu.tdp import TdpTable

ALL = [NPT, EPT, STAGE2, STAGE2_SW, Radix(12), Radix(16)]
IDS = ["npt", "ept", "stage2", "stage2-sw", "radix", "radix-64k"]
GIB = 1 << 30

# Each value is built from the source that its comment names, not from the encoder.
KNOWN = [
    # AMD64 APM vol. 2, 5.4.1: P 0, R/W 1, U/S 2, A 5, D 6, PS 7; spte.h: bits 9 and 10.
    (NPT, {"pfn": 0x12345, "level": 1, "young": True, "dirty": True}, 0x1234_5667),
    (NPT, {"pfn": 0x12345, "level": 1, "write": False}, 0x1234_5005),
    (NPT, {"pfn": 0x200, "level": 2, "young": True}, 0x0020_06A7),
    (NPT, {"pfn": GIB >> 12, "level": 3}, 0x4000_0687),
    # Intel SDM vol. 3C, table 29-7: R 0, W 1, X 2, type 5:3 (6 is WB), ignore PAT 6, A 8, D 9.
    (EPT, {"pfn": 0x12345, "level": 1, "write": False}, 0x1234_5075),
    (EPT, {"pfn": 0x12345, "young": True, "dirty": True}, 0x0600_0000_1234_5377),
    # Table 29-6: a leaf that maps 2 MiB has bit 7.
    (EPT, {"pfn": 0x400, "level": 2, "write": False, "young": True}, 0x0040_01F5),
    # Arm ARM, D8.3.1: block type 0b01, page 0b11; MemAttr 5:2, S2AP 7:6, SH 9:8, AF 10, DBM 51;
    # kvm_pgtable.h: KVM_PTE_LEAF_ATTR_LO_S2_*; MT_S2_NORMAL 0xf, inner shareable 3.
    (STAGE2, {"pfn": 0x12345, "write": False, "young": True}, 0x1234_577F),
    (STAGE2, {"pfn": 0x12345, "young": True, "dirty": True}, 0x0008_0000_1234_57FF),
    (STAGE2, {"pfn": 0x400, "level": 2, "write": False}, 0x0040_037D),
    (STAGE2_SW, {"pfn": 0x12345, "young": True}, 0x0080_0000_1234_577F),
    # book3s/64/pgtable.h: _PAGE_PRESENT bit 63, _PAGE_PTE bit 62, READ 4, WRITE 2, EXEC 1,
    # ACCESSED 0x100, DIRTY 0x80.
    (Radix(), {"pfn": 0x12345, "young": True, "dirty": True}, 0xC000_0000_1234_5187),
    (Radix(), {"pfn": 0x200, "level": 2, "write": False}, 0xC000_0000_0020_0005),
    (Radix(16), {"pfn": 0x12340, "young": True}, 0xC000_0000_1234_0107),
]


@pytest.mark.parametrize(("fmt", "fields", "value"), KNOWN)
def test_known_leaves(fmt, fields, value):
    assert hex(fmt.leaf(**fields)) == hex(value)


def test_known_table_entries():
    assert NPT.table(0x7000, 4) == 0x7027  # P, R/W, U/S, A
    assert EPT.table(0x7000, 4) == 0x7107  # R, W, X, A
    assert STAGE2.table(0x7000, 3) == 0x7003  # valid, table
    # RADIX_PGD_VAL_BITS: bit 63, and log2 of the entries of the next table.
    assert Radix().table(0x7000, 4) == 0x8000_0000_0000_7009
    assert Radix().table(0x7100, 2) == 0x8000_0000_0000_7109
    assert Radix(16).table(0x7100, 2) == 0x8000_0000_0000_7105


def test_radix_entries_are_big_endian():
    raw = Radix().to_memory(0xC000_0000_1234_5187)
    assert raw == bytes.fromhex("c000000012345187")
    assert NPT.to_memory(0x1234_5667) == bytes.fromhex("6756341200000000")


@pytest.mark.parametrize("fmt", ALL, ids=IDS)
@given(
    pfn=st.integers(0, (1 << 36) - 1),
    level=st.integers(1, 3),
    write=st.booleans(),
    young=st.booleans(),
    dirty=st.booleans(),
)
def test_leaf_round_trip(fmt, pfn, level, write, young, dirty):
    pfn &= fmt.address_mask >> 12
    value = fmt.leaf(pfn, level, write=write, young=young, dirty=dirty)
    assert fmt.from_memory(fmt.to_memory(value)) == value
    entry = fmt.decode(value, level)
    assert entry.kind == "leaf"
    assert (entry.pfn, entry.write, entry.young) == (pfn, write, young)
    assert entry.dirty == (dirty and (write or not fmt.dirty_needs_write))
    assert f"{fmt.name} level {level} leaf -> {pfn << 12:#x}" in fmt.describe(value, level)


@pytest.mark.parametrize("fmt", ALL, ids=IDS)
@given(page=st.integers(0, (1 << 36) - 1), level=st.integers(2, 4))
def test_table_round_trip(fmt, page, level):
    pa = page << 12 & fmt.table_mask
    entry = fmt.decode(fmt.table(pa, level), level)
    assert (entry.kind, entry.address, entry.young) == ("table", pa, False)


@pytest.mark.parametrize("fmt", ALL, ids=IDS)
@given(value=st.integers(0, 2**64 - 1), level=st.integers(1, 4))
def test_any_value_can_be_decoded_and_printed(fmt, value, level):
    entry = fmt.decode(value, level)
    assert fmt.describe(value, level).startswith(f"{fmt.name} level {level} {entry.kind}")


@pytest.mark.parametrize("fmt", ALL, ids=IDS)
def test_absent_and_frozen(fmt):
    assert fmt.decode(0, 1).kind == "absent"
    if fmt.frozen is not None:
        assert fmt.decode(fmt.frozen, 2).kind == "frozen"
    if fmt in (NPT, EPT):
        # Clearing an accessed or dirty bit must never change a frozen entry.
        assert not fmt.frozen & (NPT.accessed | NPT.dirty | EPT.accessed | EPT.dirty)


@pytest.mark.parametrize("fmt", ALL, ids=IDS)
def test_poison_is_read_as_a_young_leaf_or_a_pointer_to_nowhere(fmt):
    """Whatever level a walk would wrongly read a freed page at, it is noticed."""
    value = fmt.from_memory(int(lib.KH_POISON).to_bytes(8, "little"))
    assert fmt.decode(value, 1).young
    for level in (2, 3, 4):
        assert fmt.decode(value, level).kind in ("leaf", "table")


def test_describe_names_bits():
    text = NPT.describe(NPT.leaf(5, young=True), 1)
    assert text == "npt level 1 leaf -> 0x5000 [P RW US A host-writable mmu-writable]"
    assert Radix().describe(Radix().leaf(5), 1).endswith("[X W R leaf present]")


def test_what_does_not_fit_is_refused():
    for fmt in ALL:
        with pytest.raises(LayoutError):
            fmt.leaf(1 << 50)
        with pytest.raises(LayoutError):
            fmt.table(1 << 62, 2)
    with pytest.raises(LayoutError):
        Radix(16).leaf(1)
    with pytest.raises(LayoutError):
        Radix(14)
    with pytest.raises(LayoutError):
        by_name("sv39")


@pytest.mark.parametrize(
    "table",
    [
        lambda: TdpTable("npt"),
        lambda: TdpTable("npt", levels=5),
        lambda: TdpTable("ept"),
        lambda: Stage2Table(40),
        lambda: Stage2Table(48, hardware_access=False),
        lambda: RadixTable(12),
        lambda: RadixTable(16),
    ],
)
def test_the_core_writes_what_the_manuals_say(table):
    """The C core's entries and this module's were written apart; they must agree."""
    with table() as mmu:
        frames = mmu.page_bytes // 4096
        for i, bits in enumerate(range(8)):
            fields = {"write": bool(bits & 1), "young": bool(bits & 2), "dirty": bool(bits & 4)}
            mmu.map(i, (0x1000 + i) * frames, **fields)
            assert mmu.entry(i) == mmu.format.leaf((0x1000 + i) * frames, **fields)
            two = mmu.level_pages(2)
            mmu.map((i + 1) * two, (i + 1) * two * frames, 2, **fields)
            assert mmu.entry((i + 1) * two, 2) == mmu.format.leaf(
                (i + 1) * two * frames, 2, **fields
            )
        upper = mmu.format.decode(mmu.entry(0, 2), 2)
        assert upper.kind == "table"
        assert mmu.entry(0, 2) == mmu.format.table(upper.address, 2)
        assert upper.address >= 1 << 32  # in the arena, at its made-up address


@pytest.mark.parametrize(
    ("ipa_bits", "n_levels", "root_bits", "start_level", "n_start"),
    [
        # stage2_pgtable_levels() is ARM64_HW_PGTABLE_LEVELS(ipa - 4): up to 16 tables side by side
        (32, 2, 11, 2, 4),
        (34, 2, 13, 2, 16),
        (35, 3, 5, 1, 1),
        (36, 3, 6, 1, 1),
        (40, 3, 10, 1, 2),
        (42, 3, 12, 1, 8),
        (43, 3, 13, 1, 16),
        (44, 4, 5, 0, 1),
        (48, 4, 9, 0, 1),
    ],
)
def test_stage2_start_level_and_concatenation(ipa_bits, n_levels, root_bits, start_level, n_start):
    with Stage2Table(ipa_bits) as table:
        assert table.n_levels == n_levels
        assert table.index_bits[n_levels] == root_bits
        assert table.start_level == start_level
        assert table.n_start_tables == n_start
        assert table.n_gfns == 1 << (ipa_bits - 12)
        # The last page of the last start table is as good as any.
        table.map(table.n_gfns - 1, 5, young=True)
        assert table.harvest(table.n_gfns - 64, 64).gfns().tolist() == [table.n_gfns - 1]


def test_radix_index_widths():
    with RadixTable(12) as small, RadixTable(16) as large:
        assert small.index_bits[1:5] == [9, 9, 9, 13]
        assert large.index_bits[1:5] == [5, 9, 9, 13]
        assert small.n_gfns == 1 << 40
        assert large.n_gfns == 1 << 36


def test_tdp_levels():
    with TdpTable(levels=4) as four, TdpTable(levels=5) as five:
        assert (four.n_gfns, five.n_gfns) == (1 << 36, 1 << 45)


def test_parameters_out_of_range():
    for fields in (
        {"table_format": "npt", "levels": 3},
        {"table_format": "stage2", "ipa_bits": 31},
        {"table_format": "stage2", "ipa_bits": 49},
        {"table_format": "npt", "arena_pa": 12345},
    ):
        with pytest.raises(OSError, match="Invalid argument"):
            Mmu(**fields)
    for fields in ({"table_format": "npt", "sw_access": True}, {"table_format": "sv48"}):
        with pytest.raises(LayoutError):
            Mmu(**fields)
