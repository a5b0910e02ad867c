"""Tables as KVM builds them, written into a file by this module alone, and walked there."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import pytest
from kvm_tables import ALL, MIB, PARTS, Ept, Npt, Radix, Stage2, file_words, open_table

from kvmhost.bitmap import pack
from kvmhost.errors import LayoutError, TableError
from kvmhost.lab.ram import HostMemory, RamPart, ram_layout
from kvmhost.mmu.kvmtable import KvmTable, TableRoot


@pytest.fixture(params=ALL, ids=lambda kind: kind.__name__)
def writer(request, tmp_path):
    return request.param(tmp_path / "ram")


@pytest.fixture
def harvest(writer):
    """Harvest what the writer wrote by then."""

    def run(gfn_start, n_pages, **arguments):
        memory, table = open_table(writer)
        with memory, table:
            return table.harvest(gfn_start, n_pages, **arguments)

    return run


def test_the_young_ones_are_found_and_only_their_bit_is_cleared(writer, harvest):
    rng = np.random.default_rng(1)
    young = rng.random(1500) < 0.4
    gfns = 700 + np.arange(1500)
    for gfn, flag in zip(gfns.tolist(), young.tolist(), strict=True):
        writer.leaf(gfn, young=flag)
    before = file_words(writer.path)
    assert harvest(700, 1500, clear=False).gfns().tolist() == gfns[young].tolist()
    assert np.array_equal(file_words(writer.path), before)
    found = harvest(690, 1600)
    assert found.gfns().tolist() == gfns[young].tolist()
    assert found.coarse is None
    bit = int.from_bytes(struct.pack(writer.byte_order + "Q", writer.accessed), "little")
    changed = np.flatnonzero(file_words(writer.path) != before)
    assert changed.size == young.sum()
    assert set((file_words(writer.path) ^ before)[changed].tolist()) == {bit}
    assert not harvest(0, 4096)


def test_a_mask_selects_what_is_cleared(writer, harvest):
    for gfn in range(100, 140):
        writer.leaf(gfn, young=True)
    asked = np.zeros(64, dtype=bool)
    asked[3:20] = True
    assert harvest(100, 64, mask=pack(asked)).gfns().tolist() == list(range(100, 140))
    assert [g for g in range(100, 140) if not writer.young(g)] == list(range(103, 120))


@pytest.mark.parametrize("level", [2, 3])
def test_huge_leaves_are_coarse(writer, harvest, level):
    span = 1 << sum(writer.widths[-(level - 1) :])
    writer.leaf(2 * span, young=True, level=level)
    writer.leaf(3 * span, level=level)
    part = harvest(3 * span - 20, 40)
    assert part.gfns().tolist() == list(range(3 * span - 20, 3 * span))
    assert np.array_equal(part.coarse, part.words)
    assert not writer.young(2 * span, level)


def test_far_apart(writer, harvest):
    """One gfn under each of the first and last entries of the root: concatenated tables too."""
    last = (1 << sum(writer.widths)) - 1
    for gfn in (0, last):
        writer.leaf(gfn, young=True)
    assert harvest(last - 127, 128).gfns().tolist() == [last]
    assert harvest(0, 64).gfns().tolist() == [0]


def test_the_leaf_of_a_gfn(writer):
    span = 1 << writer.widths[-1]
    writer.leaf(3, young=True)
    writer.leaf(2 * span, level=2)
    memory, table = open_table(writer)
    with memory, table:
        assert table.leaf(3) == (1, writer.read(writer.entry_pa(3)))
        assert table.leaf(2 * span + 1) == (2, writer.read(writer.entry_pa(2 * span, 2)))
        assert table.leaf(4) is None
        assert table.leaf(1 << 26) is None
        ((address, n_entries),) = table.last_level(0, 3 * span)
        words = np.ctypeslib.as_array((ctypes.c_uint64 * n_entries).from_address(address))
        found = words.astype(np.uint64).byteswap() if writer.byte_order == ">" else words
        assert int(found[3]) == writer.read(writer.entry_pa(3))
        with pytest.raises(LayoutError, match="outside"):
            table.leaf(table.n_gfns)


def hostile(writer):
    """Entries that no KVM writes, as (level, value, part of the message)."""
    size = writer.parts[-1].pa + writer.parts[-1].n_bytes
    width = writer.widths[-1]
    outside = "points outside the table memory"
    yield 2, writer.pointer(size, width), outside
    yield 2, writer.pointer(2 * MIB, width), outside  # in the hole
    yield 2, writer.pointer(writer.frame & ~0xFFF, width), outside
    yield 3, writer.pointer(writer.root, writer.widths[-2]), "points to a table that contains it"
    if len(writer.widths) > 3:
        yield 4, writer.leaf_value(0, 4), "is a leaf, where the format has none"
    if isinstance(writer, Radix):
        yield 2, writer.pointer(0x18_0000, width + 1), "names another index width"


@pytest.mark.parametrize("case", range(6))
def test_hostile_entries_are_errors_and_nothing_is_written(writer, harvest, case):
    cases = dict(enumerate(hostile(writer)))
    if case not in cases:
        case = 0
    level, value, message = cases[case]
    writer.leaf(5, young=True)
    gfn = 1 << sum(writer.widths[-(level - 1) :])
    if level < len(writer.widths):
        writer.leaf(gfn, young=True)
    writer.write(writer.entry_pa(gfn, level), value)
    before = file_words(writer.path)
    with pytest.raises(TableError, match=message) as caught:
        harvest(0, 2 * gfn if level < 4 else gfn + 64)
    assert (caught.value.level, caught.value.entry) == (level, value)
    assert caught.value.gfn >> sum(writer.widths[-(level - 1) :]) == 1
    assert caught.value.cleared == 0
    assert np.array_equal(file_words(writer.path), before)
    # What lies before it can be harvested.
    assert harvest(0, 32).gfns().tolist() == [5]


def test_a_table_within_itself_at_each_level_ends(writer, harvest):
    """A root whose every entry is the root: as deep as there are levels, and no deeper."""
    for index in range(1 << writer.widths[0]):
        writer.write(writer.root + 8 * index, writer.pointer(writer.root, writer.widths[1]))
    with pytest.raises(TableError, match=r"contains it|index width"):
        harvest(0, 1 << 20)


def test_garbage_is_an_error_or_nothing_and_only_bits_are_cleared(writer, harvest):
    rng = np.random.default_rng(7)
    with writer.path.open("r+b") as file:
        file.write(rng.bytes(4 * MIB))
    before = file_words(writer.path)
    try:
        harvest(0, 1 << 18)
    except TableError as error:
        assert error.cleared == 0  # noqa: PT017
        assert np.array_equal(file_words(writer.path), before)
    bit = int.from_bytes(struct.pack(writer.byte_order + "Q", writer.accessed), "little")
    assert set((file_words(writer.path) ^ before).tolist()) <= {0, bit}


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (TableRoot("npt", 0x1008, levels=4), "unaligned"),
        (TableRoot("npt", 2 * MIB, levels=4), "outside"),
        (TableRoot("npt", (1 << 32) + 2 * MIB, levels=4), "outside"),
        (TableRoot("stage2", 2 * MIB - 4096, ipa_bits=40), "outside"),
        (TableRoot("radix", 2 * MIB - 4096), "outside"),
    ],
)
def test_roots_that_are_none(tmp_path, root, message):
    writer = Npt(tmp_path / "ram")
    with HostMemory(writer.path, PARTS) as memory, pytest.raises(TableError, match=message):
        KvmTable(memory.table_memory(), root)


@pytest.mark.parametrize(
    "root",
    [
        TableRoot("npt", 0, levels=3),
        TableRoot("stage2", 0, ipa_bits=53),
        TableRoot("radix", 0, page_shift=13),
        TableRoot("sv39", 0),  # type: ignore[arg-type]
    ],
)
def test_geometries_that_are_none(tmp_path, root):
    writer = Npt(tmp_path / "ram")
    with HostMemory(writer.path, PARTS) as memory, pytest.raises(LayoutError):
        KvmTable(memory.table_memory(), root)


@pytest.mark.parametrize("kind", [Npt, Ept])
def test_entries_of_kvm_that_are_no_leaves(tmp_path, kind):
    """An MMIO entry is present for hardware and has a generation; a frozen one has both A bits."""
    writer = kind(tmp_path / "ram")
    writer.leaf(8, young=True)
    mmio = 1 << 51 | 0xFEE0_0000 | 0x7F8 | 0x7
    frozen = 0x5A0
    for gfn, value in ((9, mmio), (10, frozen), (11, 1 << 63 | frozen)):
        writer.write(writer.entry_pa(gfn), value)
    memory, table = open_table(writer)
    with memory, table:
        assert table.harvest(0, 512).gfns().tolist() == [8]
    assert [writer.read(writer.entry_pa(g)) for g in (9, 10, 11)] == [
        mmio,
        frozen,
        1 << 63 | frozen,
    ]


def test_a_locked_entry_of_stage_2_is_no_leaf(tmp_path):
    writer = Stage2(tmp_path / "ram")
    writer.leaf(8, young=True)
    writer.write(writer.entry_pa(9), 1 << 10)
    memory, table = open_table(writer)
    with memory, table:
        assert table.harvest(0, 512).gfns().tolist() == [8]
    assert writer.read(writer.entry_pa(9)) == 1 << 10


def test_a_file_that_is_too_short(tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(b"\0" * 4096)
    with pytest.raises(OSError, match="shorter than 8192 bytes"):
        HostMemory(path, (RamPart(0, 0, 8192),))


def test_layouts():
    assert ram_layout("pc", 3 << 30) == (RamPart(0, 0, 3 << 30),)
    assert ram_layout("pc,usb=off", 4 << 30) == (
        RamPart(0, 0, 3 << 30),
        RamPart(4 << 30, 3 << 30, 1 << 30),
    )
    assert ram_layout("virt,virtualization=on", 1 << 30) == (RamPart(1 << 30, 0, 1 << 30),)
    assert ram_layout("powernv9", 1 << 30) == (RamPart(0, 0, 1 << 30),)
    with pytest.raises(LayoutError, match="q35"):
        ram_layout("q35", 1 << 30)
