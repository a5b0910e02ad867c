"""What the oracle does not reach: roots, epochs, holes, slots, deferred flush, faults."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
from waiting import until

from kvmhost.bitmap import YoungBitmap
from kvmhost.errors import LayoutError
from kvmhost.mmu.memslots import MemSlot, MemSlots
from kvmhost.mmu.radix import RadixTable
from kvmhost.mmu.stage2 import Stage2Table
from kvmhost.mmu.table import Mmu
from kvmhost.mmu.tdp import LiveTable, TdpTable

MAKERS = {
    "npt": lambda **f: TdpTable("npt", **f),
    "npt-5": lambda **f: TdpTable("npt", levels=5, **f),
    "ept": lambda **f: TdpTable("ept", **f),
    "stage2": lambda **f: Stage2Table(**f),
    "stage2-sw": lambda **f: Stage2Table(hardware_access=False, **f),
    "radix": lambda **f: RadixTable(**f),
    "radix-64k": lambda **f: RadixTable(16, **f),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def test_a_radix_hole_advances_by_its_own_size():
    """The table on which the loop of 2023 went wrong.

    Page 0 is mapped, so the first lookup leaves the shift of a base page behind; then come
    holes at three levels, and young pages right after each. A loop that takes the old
    shift visits a hole page by page (2**39 bytes of it); one that takes a stale large one
    jumps over the page after a small hole.
    """
    with RadixTable() as table:
        pages = {level: table.level_pages(level) for level in (2, 3, 4)}
        young = [0, pages[2], pages[3], pages[4], 2 * pages[4] - 1]
        for gfn in young:
            table.map(gfn, 5, young=True)
        table.map(2 * pages[2], 2 * pages[2], 2, young=True)
        table.map(3 * pages[2], 1, young=True)
        n = 2 * pages[4]
        found = table.harvest(0, n)
        expected = sorted({*young, *range(2 * pages[2], 3 * pages[2]), 3 * pages[2]})
        assert found.gfns().tolist() == expected
        # 2**28 pages of holes are a few hundred steps by their own size; one by one they are
        # more than the suite's time limit allows.
        assert table.stats()["tables"] == 6


@every
def test_epoch_keeps_unlinked_tables_until_walks_have_left(make):
    with make(poison=True) as table:
        table.map(0, 0, n=table.level_pages(2), young=True)
        used = table.counters()["table_bytes"]
        with table.epoch():
            table.zap_all()
            counters = table.counters()
            assert counters["retired"] > 0
            root = 8 << table.index_bits[table.n_levels]
            assert counters["table_bytes"] == used + root
        table.synchronize()
        counters = table.counters()
        assert counters["retired"] == 0
        assert counters["roots"] == 1
        assert counters["table_bytes"] == root


@every
def test_freed_tables_are_never_walked(make):
    """Harvests run while tables come and go; freed ones are full of poison."""
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            table.map(0, 0, n=table.level_pages(2), young=True)
            table.collapse(0, 2)
            table.split(0, 1)
            table.zap_all()

    with make(poison=True) as table:
        thread = threading.Thread(target=churn)
        thread.start()

        def walked_while_freed():
            table.harvest(0, 2048)
            return table.counters()["freed"] > 10 and table.stats()["young"] > 0

        try:
            until(walked_while_freed, "tables freed under harvests that saw young leaves")
        finally:
            stop.set()
            thread.join()
        walked = table.stats()
        assert walked["poisoned"] == walked["bad_pointers"] == 0


@every
def test_an_invalid_root_is_still_aged_until_it_is_gone(make):
    with make(poison=True) as table:
        table.map(3, table.page_bytes // 4096, young=True)
        table.invalidate_roots()
        assert table.counters()["roots"] == 2
        assert table.leaf(3) is None  # vCPUs use the new root
        assert table.harvest(0, 64, clear=False).gfns().tolist() == [3]
        table.map(4, table.page_bytes // 4096, young=True)
        assert table.harvest(0, 64).gfns().tolist() == [3, 4]
        assert table.zap_invalidated_roots() == 1
        assert table.counters()["roots"] == 1
        assert table.leaf(4) is not None


def test_address_spaces_are_apart():
    with TdpTable(n_as=2, poison=True) as table:
        table.map(1, 1, young=True, as_id=0)
        table.map(2, 2, young=True, as_id=1)
        assert table.harvest(0, 64, as_id=0).gfns().tolist() == [1]
        assert table.harvest(0, 64, as_id=1).gfns().tolist() == [2]
        with pytest.raises(OSError, match="Invalid"):
            table.map(1, 1, as_id=2)
        table.zap_all()
        assert table.counters()["roots"] == 2


def test_slots_come_go_and_move():
    hva = 0x4000_0000
    with TdpTable() as table:
        table.set_slots(MemSlots([MemSlot(0, 0, 64, hva), MemSlot(1, 100, 64, hva)]))
        for gfn in (5, 105):
            table.touch(gfn)
        assert table.leaf(5)[1].pfn == table.leaf(105)[1].pfn
        # Moved in gfn: unmapped at its old place. Deleted: unmapped.
        table.set_slots(table.slots.with_slot(MemSlot(0, 200, 64, hva)))
        assert table.leaf(5) is None
        with pytest.raises(OSError, match="Bad address"):
            table.touch(5)
        table.touch(205)
        table.set_slots(table.slots.without(1))
        assert table.leaf(105) is None
        assert table.harvest(0, 300).gfns().tolist() == [205]
        with pytest.raises(LayoutError, match="outside"):
            table.set_slots(MemSlots([MemSlot(0, table.n_gfns - 1, 2, hva)]))


@every
def test_read_only_slot(make):
    with make() as table:
        table.set_slots(
            MemSlots([MemSlot(0, 0, 64, 1 << 30, read_only=True)], page_bytes=table.page_bytes)
        )
        table.touch(1)
        with pytest.raises(OSError, match="Read-only"):
            table.touch(1, write=True)
        assert not table.leaf(1)[1].write
        assert table.harvest_dirty(0, 64).count() == 0


@every
def test_dirty_logging_splits_and_finds_every_write(make):
    with make(poison=True) as table:
        two = table.level_pages(2)
        slot = MemSlot(0, 0, 4 * two, 1 << 40)
        table.set_slots(MemSlots([slot], page_bytes=table.page_bytes))
        table.touch(two + 3, write=True)
        assert table.leaf(two + 3)[0] > 1
        table.set_dirty_logging(0, True)
        assert table.leaf(two + 3)[0] == 1
        assert table.harvest_dirty(0, 4 * two, clear=False).count() == 0
        written = [0, two + 3, two + 4, 3 * two]
        for gfn in written:
            table.touch(gfn, write=True)
        for gfn in (1, 2 * two):
            table.touch(gfn)
        assert table.harvest_dirty(0, 4 * two).gfns().tolist() == written
        assert table.harvest_dirty(0, 4 * two).count() == 0
        table.set_dirty_logging(0, False)
        table.collapse(two, 2)
        assert table.leaf(two + 3)[0] == 2
        with pytest.raises(LayoutError, match="no such slot"):
            table.set_dirty_logging(7, True)


@pytest.mark.parametrize("make", [MAKERS["stage2-sw"], lambda **f: RadixTable(
    hardware_access=False, **f)], ids=["stage2-sw", "radix-sw"])  # fmt: skip
def test_without_hardware_bits_the_fault_handler_sets_them(make):
    with make() as table:
        table.set_slots(MemSlots([MemSlot(0, 0, 64, 1 << 30, huge=False)]))
        table.touch(7)
        # A new leaf is young, as the kernel's is: the access that faulted must not fault again.
        assert table.access(7) == 0
        assert table.harvest(0, 64).gfns().tolist() == [7]
        assert table.access(7) == 2  # access flag fault
        faults = table.counters()["faults"]
        table.touch(7)
        assert table.counters()["faults"] == faults + 1
        assert table.harvest(0, 64).gfns().tolist() == [7]


def test_the_same_walk_reads_live_tables_and_own_ones(long_mode_tables):
    rng = np.random.default_rng(5)
    tables = long_mode_tables()
    with TdpTable("npt") as own:
        for gfn in rng.choice(4096, 700, replace=False).tolist():
            young = bool(rng.random() < 0.5)
            tables.map(gfn, flags=1 << 5 if young else 0)
            own.map(gfn, gfn, young=young)
        with LiveTable(tables.memory, tables.root_pa) as live:
            for start, n in ((0, 4096), (17, 1000), (512, 512)):
                assert live.harvest(start, n, clear=False) == own.harvest(start, n, clear=False)
            assert live.harvest(0, 4096) == own.harvest(0, 4096)
            assert live.harvest(0, 4096).count() == own.harvest(0, 4096).count() == 0
            assert type(live).harvest is type(own).harvest


def test_deferred_flush_raises_the_mark_and_one_flush_settles_it():
    with TdpTable() as table:
        for gfn in range(4):
            table.map(gfn, gfn)
        before = table.counters()["flushes"]
        assert table.unmap(0, 1, defer_flush=True)
        assert table.unmap(1, 2, defer_flush=True)
        assert not table.unmap(9, 10, defer_flush=True)
        counters = table.counters()
        assert (counters["flushes"], counters["tlbs_dirty"]) == (before, 2)
        # Somebody who needs no flush of their own has to do the deferred one.
        assert table.flush_remote_cond(False)
        counters = table.counters()
        assert (counters["flushes"], counters["tlbs_dirty"]) == (before + 1, 0)
        assert not table.flush_remote_cond(False)


def test_holes_cost_nothing():
    with TdpTable(levels=5) as table:
        empty = table.counters()["table_bytes"]
        table.map(table.n_gfns - 1, 1)
        assert table.counters()["table_bytes"] - empty == 4 * 4096
        assert table.harvest(table.n_gfns - (1 << 20), 1 << 20, clear=False).count() == 0


def test_a_full_arena_is_an_error_and_changes_nothing():
    with TdpTable(arena_bytes=1 << 16) as table:
        made = 0
        while table.counters()["table_bytes"] < 1 << 16:
            table.map(made << 9, 0)
            made += 1
        with pytest.raises(OSError, match="Cannot allocate"):
            table.map(made << 9, 0)
        assert table.harvest(0, made << 9).count() == 0
        assert table.leaf((made - 1) << 9) is not None
        assert table.leaf(made << 9) is None
        table.map(1, 1)
        assert table.leaf(1) is not None


def test_dump_shows_the_path():
    with TdpTable() as table:
        table.map(0x12345, 0x999, young=True)
        lines = table.dump(0x12345)
        assert [line.split(" level ")[1][0] for line in lines] == list("4321")
        assert "leaf -> 0x999000" in lines[-1]
        assert table.entry(0x7FFFFFF, 1) is None
        assert len(table.dump(0x7FFFFFF)) < 4
        with pytest.raises(LayoutError, match="levels 1 to 4"):
            table.level_pages(5)


@every
def test_a_leaf_that_is_split_or_collapsed_is_seen_whole_or_not_at_all(make):
    """One huge leaf changes its form all the time; nothing clears, so it stays young."""
    stop = threading.Event()
    with make(poison=True) as table:
        two = table.level_pages(2)
        table.map(0, 0, 2, young=True)

        changes = itertools.count()
        done = [0]

        def change():
            while not stop.is_set():
                table.split(0, 1)
                table.collapse(0, 2)
                done[0] = next(changes)

        thread = threading.Thread(target=change)
        thread.start()
        seen = set()

        def seen_whole():
            seen.add(table.harvest(0, two, clear=False).count())
            return two in seen and done[0] >= 100

        try:
            until(seen_whole, "a hundred changes of form under harvests")
        finally:
            stop.set()
            thread.join()
        # All pages (as one leaf, or as the leaves of its table), or, in the moment of
        # break-before-make, none. While a collapse drains the table, the part that is left.
        assert two in seen
        assert table.harvest(0, two).count() == two


def test_many_leaves_of_each_level():
    with Mmu("npt") as table:
        table.map(0, 0, n=1000, young=True)
        table.map(1024, 1024, 2, n=3, young=True)
        table.map(1 << 18, 1 << 18, 3, n=2, young=True)
        assert table.harvest(0, 4096).count() == 1000 + 3 * 512
        big = table.harvest(1 << 18, 3 << 18)
        assert big.count() == 2 << 18
        assert np.array_equal(big.coarse_as_bool(), big.as_bool())


@every
def test_mark_young_feeds_what_a_tracker_learned(make):
    with make() as table:
        two = table.level_pages(2)
        table.map(0, 0, n=two)
        table.map(2 * two, 0, 2)
        gfns = [0, 5, two - 1, two, 3 * two - 1]
        learned = YoungBitmap.from_gfns(0, 4 * two, gfns)
        # Page `two` is not mapped; the last one lies in a huge leaf.
        assert table.mark_young(0, 4 * two, learned.words) == 4
        assert table.mark_young(0, 4 * two, learned.words) == 0
        found = table.harvest(0, 4 * two)
        assert found.gfns().tolist() == [0, 5, two - 1, *range(2 * two, 3 * two)]
        assert table.mark_young(0, 4 * two) == two + 1
        with pytest.raises(LayoutError, match="mark_young"):
            table.mark_young(0, 100, np.zeros(1, dtype=np.uint64))


@pytest.mark.parametrize("ipa_bits", range(32, 49))
def test_stage2_starts_where_up_to_16_concatenated_tables_suffice(ipa_bits):
    """Arm ARM, D8.2.2: with 4 KiB pages level 2 up to 34 bits, level 1 up to 43, level 0 above."""
    with Stage2Table(ipa_bits) as table:
        start = 2 if ipa_bits <= 34 else 1 if ipa_bits <= 43 else 0
        assert table.start_level == start
        # A start table resolves 9 bits of the address; those of lower levels, 9 each.
        resolved = 12 + 9 * (4 - start)
        assert table.n_start_tables == 1 << max(0, ipa_bits - resolved)
        assert table.n_gfns == 1 << (ipa_bits - 12)


@pytest.mark.parametrize("shared", [False, True])
def test_a_lost_race_ends_a_stage2_walk_by_its_own_flag(shared):
    """The rule of kvm_pgtable_walk_continue(): not KVM_PGTABLE_WALK_SHARED decides."""
    with Stage2Table(40) as table:
        table.map(512, 512, n=1024)
        # Ends at the entry that lost, also from within a table two levels down.
        assert table.count_visits(512, 1536, 700, ignore_eagain=False, shared=shared) == (
            189,
            False,
        )
        assert table.count_visits(512, 1536, 700, ignore_eagain=True, shared=shared) == (1024, True)
        # A race that is not lost decides nothing.
        assert table.count_visits(512, 1536, 5, ignore_eagain=False, shared=shared) == (1024, True)
