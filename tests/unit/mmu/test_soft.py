"""TLB model and soft vCPUs: counts that arithmetic predicts."""

from __future__ import annotations

import numpy as np
import pytest
from waiting import until

from kvmhost.bitmap import YoungBitmap
from kvmhost.errors import KvmHostError, LayoutError
from kvmhost.mmu.memslots import MemSlot, MemSlots
from kvmhost.mmu.soft import SoftEngine, Trace
from kvmhost.mmu.table import Mmu
from kvmhost.mmu.tlb import Tlb, TlbGeometry

N = 4096
FORMATS = [
    ("npt", {}),
    ("ept", {}),
    ("stage2", {}),
    ("stage2", {"sw_access": True}),
    ("radix", {}),
    ("radix", {"page_shift": 16}),
]


def make(table_format="npt", n_pages=N, huge=False, **fields):
    table = Mmu(table_format, poison=True, **fields)
    slot = MemSlot(0, 0, n_pages, 0x4000_0000, huge=huge)
    table.set_slots(MemSlots([slot], page_bytes=table.page_bytes))
    return table


def test_tlb_keeps_what_fits_and_drops_the_least_recently_used():
    tlb = Tlb(TlbGeometry(4, 2, 0, 0))
    for gfn in (0, 4, 8):  # one set of two ways
        tlb.insert(gfn)
    assert [tlb.lookup(g) for g in (0, 4, 8)] == [0, 1, 1]
    tlb.lookup(4)
    tlb.insert(12)
    assert [tlb.lookup(g) for g in (4, 8, 12)] == [1, 0, 1]
    assert tlb.lookup(5) == 0
    tlb.flush_page(4)
    assert tlb.lookup(4) == 0
    tlb.flush()
    assert tlb.lookup(12) == 0


def test_tlb_holds_huge_translations_apart():
    tlb = Tlb(TlbGeometry(1, 1, 1, 2))
    tlb.insert(7)
    tlb.insert(512 * 3 + 5, level=2)
    tlb.insert(1 << 18, level=3)
    assert tlb.lookup(7) == 1
    assert tlb.lookup(512 * 3 + 500) == 2
    assert tlb.lookup((1 << 18) + 99_999) == 3
    tlb.flush_page(512 * 3)
    assert tlb.lookup(512 * 3 + 500) == 0


def test_a_write_needs_a_translation_that_was_written():
    tlb = Tlb()
    tlb.insert(1)
    assert tlb.lookup(1) == 1
    assert tlb.lookup(1, write=True) == 0
    tlb.insert(1, write=True)
    assert tlb.lookup(1, write=True) == 1


def test_tlb_geometry_is_checked():
    for geometry in (TlbGeometry(3, 1), TlbGeometry(4, 0), TlbGeometry(4, 1, 5, 1)):
        with pytest.raises(LayoutError):
            Tlb(geometry)


@pytest.mark.parametrize(("table_format", "fields"), FORMATS)
def test_sequential_first_touch_faults_once_a_page(table_format, fields):
    with make(table_format, **fields) as table:
        reports = SoftEngine(table).run(Trace.sequential(0, N), n_vcpus=1, n_accesses=2 * N)
        (report,) = reports
        assert (report.accesses, report.faults, report.tlb_hits) == (2 * N, N, 0)
        assert report.errors == 0
        assert table.harvest(0, N).count() == N
        assert table.counters()["born_young"] == N


@pytest.mark.parametrize(("table_format", "fields"), FORMATS)
def test_strided_reads_make_exactly_those_pages_young(table_format, fields):
    with make(table_format, **fields) as table:
        engine = SoftEngine(table)
        engine.run(Trace.sequential(0, N), n_vcpus=2, n_accesses=N)
        table.harvest(0, N)
        engine.run(Trace.strided(0, N, 4), n_vcpus=1, n_accesses=N // 4)
        assert table.harvest(0, N).gfns().tolist() == list(range(0, N, 4))
        assert table.harvest_dirty(0, N).count() == 0


def test_a_cached_translation_leaves_the_page_old_until_a_flush():
    """The staleness that a harvest without flush accepts, and what ends it."""
    pages = 64
    with make() as table:
        engine = SoftEngine(table, TlbGeometry(16, 8))
        run = engine.start(Trace.sequential(0, pages), n_vcpus=1)
        until(
            lambda: table.harvest(0, pages).count() == 0 and run.progress() > 10 * pages,
            "no young page",
        )
        # The vCPU goes on, all of its pages are cached: nothing becomes young.
        done = run.progress()
        until(lambda: run.progress() > done + 100 * pages, "more accesses")
        assert table.harvest(0, pages, clear=False).count() == 0
        table.flush_remote()
        until(lambda: table.harvest(0, pages, clear=False).count() == pages, "all young")
        run.stop()
        (report,) = run.wait()
        assert report.tlb_flushes == 1
        assert report.tlb_misses == 2 * pages


def test_a_small_tlb_forgets_and_pages_become_young_again():
    with make() as table:
        engine = SoftEngine(table, TlbGeometry(4, 1))
        engine.run(Trace.sequential(0, N), n_vcpus=1, n_accesses=N)
        table.harvest(0, N)
        engine.run(Trace.sequential(0, N), n_vcpus=1, n_accesses=N)
        assert table.harvest(0, N).count() == N


def test_huge_leaf_is_one_miss():
    with make(n_pages=1024, huge=True) as table:
        engine = SoftEngine(table, TlbGeometry())
        (report,) = engine.run(Trace.sequential(0, 1024), n_vcpus=1, n_accesses=1024)
        assert (report.faults, report.tlb_misses) == (2, 2)
        found = table.harvest(0, 1024)
        assert found.count() == found.coarse_as_bool().sum() == 1024


def test_traces_depend_on_the_seed_alone():
    with make() as table:
        engine = SoftEngine(table)
        trace = Trace.random(0, N, write_permille=250)
        first, writes = engine.preview(trace, 5000, seed=7)
        assert np.array_equal(first, engine.preview(trace, 5000, seed=7)[0])
        assert not np.array_equal(first, engine.preview(trace, 5000, seed=8)[0])
        assert not np.array_equal(first, engine.preview(trace, 5000, vcpu=1, n_vcpus=2, seed=7)[0])
        assert 0.2 < writes.mean() < 0.3
        # What runs is what was previewed.
        (report,) = engine.run(trace, n_vcpus=1, n_accesses=5000, seed=7)
        assert report.last_gfn == first[-1]
        assert table.harvest(0, N).gfns().tolist() == sorted(set(first.tolist()))
        assert table.harvest_dirty(0, N).gfns().tolist() == sorted(set(first[writes].tolist()))


def test_zipf_and_hot_cold_have_their_shape():
    with make() as table:
        engine = SoftEngine(table)
        gfns, _ = engine.preview(Trace.zipf(0, N), 100_000)
        counts = np.sort(np.bincount(gfns.astype(np.int64), minlength=N))[::-1]
        harmonic = (1 / np.arange(1, N + 1)).sum()
        assert counts[0] / 100_000 == pytest.approx(1 / harmonic, rel=0.1)
        assert counts[:10].sum() / 100_000 == pytest.approx(
            (1 / np.arange(1, 11)).sum() / harmonic, rel=0.1
        )
        gfns, _ = engine.preview(Trace.hot_cold(0, N, 100, 0.8), 100_000)
        assert (gfns < 100).mean() == pytest.approx(0.8, abs=0.02)
        assert gfns.max() < N


def test_recorded_trace_replays_a_bitmap():
    bitmap = YoungBitmap.from_gfns(0, N, [3, 77, 4000])
    with make() as table:
        SoftEngine(table).run(Trace.recorded(bitmap), n_vcpus=1, n_accesses=7)
        assert table.harvest(0, N) == bitmap
    with pytest.raises(LayoutError, match="no page"):
        Trace.recorded(YoungBitmap.from_gfns(0, N, []))


def test_thousands_of_vcpus_on_two_threads():
    with make() as table:
        engine = SoftEngine(table, TlbGeometry(4, 2, 0, 0))
        reports = engine.run(Trace.random(0, N), n_vcpus=2000, n_threads=2, n_accesses=20)
        assert len(reports) == 2000
        assert {r.accesses for r in reports} == {20}
        assert sum(r.set_young for r in reports) == table.counters()["set_young"]
        counted = table.counters()
        assert counted["born_young"] + counted["set_young"] == table.harvest(0, N).count()


def test_accesses_outside_the_slots_are_counted_and_do_no_harm():
    with make(n_pages=10) as table:
        (report,) = SoftEngine(table).run(Trace.sequential(0, 20), n_vcpus=1, n_accesses=20)
        assert report.errors == 10
        assert table.harvest(0, 64).count() == 10


def test_private_regions_do_not_overlap():
    with make() as table:
        trace = Trace.sequential(0, 256, private=True)
        reports = SoftEngine(table).run(trace, n_vcpus=4, n_accesses=256)
        assert table.harvest(0, N).gfns().tolist() == list(range(1024))
        assert sum(r.faults - r.fault_retries for r in reports) == 1024


def test_misuse_is_named():
    with make() as table:
        engine = SoftEngine(table)
        with pytest.raises(OSError, match="kh_soft_start"):
            engine.start(Trace.random(0, N), n_vcpus=2, n_threads=3)
        with pytest.raises(LayoutError, match="hot"):
            Trace.hot_cold(0, 10, 10)
        run = engine.start(Trace.random(0, N), n_vcpus=1, n_accesses=10)
        run.wait()
        with pytest.raises(KvmHostError, match="waited"):
            run.stop()


def test_release_ends_the_vcpus():
    with make() as table:
        run = SoftEngine(table).start(Trace.random(0, N), n_vcpus=2)
        until(lambda: run.progress() > 1000, "a thousand accesses")
        table.release()
        run.wait()
        assert table.harvest(0, N).count() == 0
