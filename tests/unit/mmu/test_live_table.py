"""Harvest of tables that something else owns, in long-mode layout."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvmhost.bitmap import Provenance, pack, unpack
from kvmhost.errors import KvmHostError, LayoutError
from kvmhost.mmu.memslots import MemSlot, MemSlots
from kvmhost.mmu.tablemem import TableMemory
from kvmhost.mmu.tdp import LiveTable

PRESENT, WRITE, ACCESSED, DIRTY = 1, 2, 1 << 5, 1 << 6


def test_reports_and_clears_exactly_the_young_leaves(scan, long_mode_tables):
    tables = long_mode_tables()
    young = [0, 1, 63, 64, 511, 512, 1000, 262_144, 262_145]
    for gfn in {*young, 2, 3, 513, 262_146}:
        tables.map(gfn, flags=ACCESSED if gfn in young else 0)
    with LiveTable(tables.memory, tables.root_pa) as table:
        assert table.harvest(0, 300_000, clear=False).gfns().tolist() == young
        assert table.harvest(0, 300_000).gfns().tolist() == young
        assert table.harvest(0, 300_000).count() == 0
        assert table.stats()["cleared"] == len(young)
    assert tables.get(2) == (2 << 12) | PRESENT | WRITE
    # Table entries had their accessed bit set; a harvest never changes those.
    assert tables.get(0, level=2) & ACCESSED
    assert tables.get(0, level=4) & ACCESSED


@pytest.mark.parametrize("start", [0, 1, 37, 511, 512, 700])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 500, 1200])
def test_range_at_any_alignment(scan, start, n, long_mode_tables):
    rng = np.random.default_rng(start * 10_000 + n)
    young = rng.random(2048) < 0.3
    tables = long_mode_tables()
    for gfn in range(2048):
        tables.map(gfn, flags=ACCESSED if young[gfn] else 0)
    asked = rng.random(n) < 0.5
    with LiveTable(tables.memory, tables.root_pa) as table:
        seen = table.harvest(start, n, mask=pack(asked)).as_bool()
    assert np.array_equal(seen, young[start : start + n])
    left = np.array([bool(tables.get(g) & ACCESSED) for g in range(2048)])
    expected = young.copy()
    expected[start : start + n] &= ~asked
    assert np.array_equal(left, expected)


def test_absent_entries_are_not_young_whatever_they_hold(scan, long_mode_tables):
    tables = long_mode_tables()
    for gfn in range(128):
        tables.map(gfn, flags=ACCESSED)
        if gfn % 3 == 0:
            tables.words[tables.entry(gfn)] &= ~np.uint64(PRESENT)
    with LiveTable(tables.memory, tables.root_pa) as table:
        assert table.harvest(0, 128).gfns().tolist() == [g for g in range(128) if g % 3]
    assert tables.get(0) & ACCESSED


def test_dirty_bits_are_their_own(scan, long_mode_tables):
    tables = long_mode_tables()
    tables.map(5, flags=ACCESSED | DIRTY)
    tables.map(6, flags=ACCESSED)
    with LiveTable(tables.memory, tables.root_pa) as table:
        assert table.harvest_dirty(0, 10).gfns().tolist() == [5]
        assert table.harvest_dirty(0, 10).count() == 0
        assert table.harvest(0, 10).gfns().tolist() == [5, 6]


def test_huge_leaf_is_coarse_and_cleared_if_any_page_asks(long_mode_tables):
    tables = long_mode_tables()
    tables.map(512, flags=ACCESSED, level=2)
    tables.map(1 << 18, flags=ACCESSED, level=3)
    tables.map(3, flags=ACCESSED)
    with LiveTable(tables.memory, tables.root_pa) as table:
        mask = np.zeros(32, dtype=np.uint64)
        found = table.harvest(0, 2048, mask=mask)
        assert found.gfns().tolist() == [3, *range(512, 1024)]
        assert np.flatnonzero(found.coarse_as_bool()).tolist() == list(range(512, 1024))
        assert tables.get(512, level=2) & ACCESSED
        mask[1000 // 64] = np.uint64(1 << (1000 % 64))
        assert table.harvest(0, 2048, mask=mask).count() == 513
        assert not tables.get(512, level=2) & ACCESSED
        part = table.harvest((1 << 18) + 100, 50)
        assert part.count() == 50
        assert part.coarse is not None
        assert not tables.get(1 << 18, level=3) & ACCESSED
        assert table.harvest(3, 1).coarse is None


def test_pointers_out_of_the_memory_are_counted_and_passed_by(long_mode_tables):
    tables = long_mode_tables()
    tables.map(7, flags=ACCESSED)
    for index, pa in enumerate([0, 0xDEAD000, tables.base_pa - 4096, 1 << 51], start=1):
        tables.words[tables.entry(index << 9, level=2)] = pa | PRESENT
    tables.words[tables.entry(1 << 18, level=3)] = 0x7FFF_FFFF_F000 | PRESENT
    with LiveTable(tables.memory, tables.root_pa) as table:
        assert table.harvest(0, 1 << 20).gfns().tolist() == [7]
        assert table.stats()["bad_pointers"] == 5
    # A table that points to itself: as many levels as there are, and no more.
    tables.words[0, 511] = tables.base_pa | PRESENT | ACCESSED
    with LiveTable(tables.memory, tables.root_pa) as table:
        table.harvest((1 << 36) - 512, 512)


def test_last_gfn_of_the_address_space(long_mode_tables):
    tables = long_mode_tables()
    tables.map((1 << 36) - 1, flags=ACCESSED)
    with LiveTable(tables.memory, tables.root_pa) as table:
        assert table.harvest((1 << 36) - 64, 64, clear=False).gfns().tolist() == [(1 << 36) - 1]
        assert table.harvest((1 << 36) - 64, 128).gfns().tolist() == [(1 << 36) - 1]


def test_gfns_without_slot_are_zero(long_mode_tables):
    tables = long_mode_tables()
    for gfn in range(200):
        tables.map(gfn, flags=ACCESSED)
    slots = MemSlots([MemSlot(0, 10, 20, 0x1000_0000), MemSlot(1, 100, 5, 0x2000_0000)])
    with LiveTable(tables.memory, tables.root_pa, slots=slots) as table:
        assert table.harvest(0, 200).gfns().tolist() == [*range(10, 30), *range(100, 105)]
    assert tables.get(9) & ACCESSED
    assert not tables.get(10) & ACCESSED


def test_wire_form_flips_young_and_clears_where_asked(long_mode_tables):
    tables = long_mode_tables()
    hva = 0x7000_0000
    for gfn in range(100, 140):
        tables.map(gfn, flags=ACCESSED if gfn % 2 else 0)
    slots = MemSlots([MemSlot(0, 100, 40, hva)])
    asked = np.arange(40) < 20
    bitmap = pack(asked[::-1])
    with LiveTable(tables.memory, tables.root_pa, slots=slots) as table:
        assert table.test_clear_young(hva, hva + 40 * 4096, bitmap) == 20
    result = unpack(bitmap, 40)[::-1]
    young = np.arange(100, 140) % 2 == 1
    assert np.array_equal(result, asked ^ young)
    for gfn in range(100, 140):
        assert bool(tables.get(gfn) & ACCESSED) == (young[gfn - 100] and gfn >= 120)


def test_wire_form_ends_at_the_top_of_the_address_space(long_mode_tables):
    tables = long_mode_tables()
    for gfn in (2, 3):
        tables.map(gfn, flags=ACCESSED)
    top = 1 << 64
    slots = MemSlots([MemSlot(0, 0, 4, top - 4 * 4096)])
    for end in (top, 0):
        bitmap = np.zeros(1, dtype=np.uint64)
        with LiveTable(tables.memory, tables.root_pa, slots=slots) as table:
            assert table.test_clear_young(top - 4 * 4096, end, bitmap) == 2
        assert bitmap.tolist() == [0b0011]


def test_overlapping_slots_flip_a_bit_once(long_mode_tables):
    tables = long_mode_tables()
    tables.map(5, flags=ACCESSED)
    tables.map(1005, flags=ACCESSED)
    slots = MemSlots([MemSlot(0, 0, 10, 0x10000), MemSlot(1, 1000, 10, 0x10000)])
    bitmap = np.zeros(1, dtype=np.uint64)
    with LiveTable(tables.memory, tables.root_pa, slots=slots) as table:
        assert table.test_clear_young(0x10000, 0x10000 + 10 * 4096, bitmap) == 1
    assert bitmap.tolist() == [1 << (10 - 5 - 1)]


def test_misuse_is_named(long_mode_tables):
    tables = long_mode_tables()
    with pytest.raises(LayoutError, match="root table"):
        LiveTable(tables.memory, 0x5000)
    with pytest.raises(LayoutError, match="root table"):
        LiveTable(tables.memory, tables.root_pa + 8)
    with pytest.raises(LayoutError, match="table format"):
        LiveTable(tables.memory, tables.root_pa, table_format="stage3")
    with pytest.raises(OSError, match="kh_mmu_open_live"):
        LiveTable(tables.memory, tables.root_pa, levels=3)
    table = LiveTable(tables.memory, tables.root_pa)
    with pytest.raises(LayoutError, match="mask"):
        table.harvest(0, 100, mask=np.zeros(1, dtype=np.uint64))
    with pytest.raises(LayoutError, match="bad range"):
        table.harvest(-1, 100)
    with pytest.raises(LayoutError, match="memslots"):
        table.test_clear_young(0, 4096, np.zeros(1, dtype=np.uint64))
    table.close()
    table.close()
    with pytest.raises(KvmHostError, match="closed"):
        table.harvest(0, 1)
    for regions in ([], [(0, 4096, 0)], [(8, 4096, 8)], [(0, 4096, 8192), (4096, 4096, 4096)]):
        with pytest.raises(LayoutError):
            TableMemory(regions)


def test_provenance_windows_touch(long_mode_tables):
    tables = long_mode_tables()
    with LiveTable(tables.memory, tables.root_pa) as table:
        first = table.harvest(0, 1).provenance
        second = table.harvest(0, 1).provenance
        assert (first.tracker, first.table_format) == ("guestpt", "npt")
        assert second.window_start_ns == first.window_end_ns > 0
        mine = Provenance("mine", "npt", 1, 2)
        assert table.harvest(0, 1, provenance=mine).provenance is mine


def test_concurrent_harvests_share_out_every_bit(long_mode_tables):
    """Each bit that was set is reported by exactly one of several clearing harvests."""
    tables = long_mode_tables()
    n = 8192
    for gfn in range(n):
        tables.map(gfn, flags=ACCESSED)
    counts = np.zeros((4, n), dtype=np.int64)
    with LiveTable(tables.memory, tables.root_pa) as table:
        start = threading.Barrier(4)

        def work(row):
            start.wait()
            counts[row] += table.harvest(0, n).as_bool()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (counts.sum(axis=0) == 1).all()
