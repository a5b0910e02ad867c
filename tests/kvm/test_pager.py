"""Eviction and fault-in under running guests: no byte is lost, and failures are refusals.

The oracle is the hotcold guest: it checks all 4096 bytes of a page on every touch.
"""

from __future__ import annotations

import contextlib
import select
import time
from pathlib import Path

import numpy as np
import pytest
from waiting import DEADLINE_S, until

from kvmhost.errors import LayoutError, LostPageError
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.memory.layout import PARAMS_GPA
from kvmhost.pager.options import StoreOptions
from kvmhost.pager.results import EvictOutcome, PageState
from kvmhost.units import PAGE_BYTES

pytestmark = pytest.mark.requires_uffd

ENGINES = [pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]
START, PAGES = 1024, 6000
WITH_LIST = PAGES + PAGES * 4 // PAGE_BYTES + 1


def hotcold(engine: str = "kvm", n_vcpus: int = 2, **params: int) -> Machine:
    given = {
        "gfn_start": START,
        "pages": PAGES,
        "hot": 500,
        "scan_every": 5,
        "scan_epochs": 3,
        "epochs": 0,
        "write_permille": 700,
    }
    return Machine(
        image_path("hotcold"),
        mem_bytes=48 << 20,
        engine=engine,
        n_vcpus=n_vcpus,
        params=given | params,
    )


def evict_until(machine: Machine, evictions: int, seconds: float = 550) -> int:
    """Evict at random, in runs and single pages, until so many pages went."""
    rng = np.random.default_rng(5)
    done, deadline = 0, time.monotonic() + seconds
    while done < evictions:
        assert machine.running, (machine.error, machine.console_text())
        assert time.monotonic() < deadline
        if rng.random() < 0.5:
            gfns = START + np.sort(rng.choice(WITH_LIST, 600, replace=False))
        else:
            gfns = START + np.arange(600) + rng.integers(0, WITH_LIST - 600)
        done += machine.open_pager().evict(gfns).count(EvictOutcome.DONE)
    return done


@pytest.mark.parametrize("engine", ENGINES)
def test_ten_thousand_evictions_under_two_busy_vcpus(engine: str) -> None:
    with hotcold(engine) as machine:
        machine.start()
        until(lambda: machine.doorbells >= 2, "the first epoch")
        evict_until(machine, 10_000)
        epochs = machine.doorbells
        until(lambda: machine.doorbells > epochs + 10, "the guest goes on")
        assert machine.error is None
        assert machine.open_pager().counters()["fault_ins"] > 5000


@pytest.mark.slow
@pytest.mark.requires_kvm
def test_a_million_evictions_under_two_busy_vcpus() -> None:
    with hotcold() as machine:
        machine.start()
        until(lambda: machine.doorbells >= 2, "the first epoch")
        evict_until(machine, 1_000_000)
        epochs = machine.doorbells
        until(lambda: machine.doorbells > epochs + 10, "the guest goes on")
        assert machine.error is None
        assert machine.open_pager().counters()["wp_faults"] > 0


@pytest.mark.requires_kvm
def test_writes_that_race_an_eviction_find_their_data() -> None:
    with hotcold(pages=PAGES, hot=PAGES // 2, write_permille=1000, cold=0) as machine:
        machine.start()
        until(lambda: machine.doorbells >= 2, "the first epoch")
        hot = START + PAGES // 8 + np.arange(64)
        deadline = time.monotonic() + DEADLINE_S
        while machine.open_pager().counters()["wp_faults"] < 20:
            machine.open_pager().evict(hot)
            assert machine.running, machine.console_text()
            assert time.monotonic() < deadline


@pytest.mark.parametrize("engine", ENGINES)
def test_guest_ends_well_with_everything_evicted_between_epochs(engine: str) -> None:
    with hotcold(engine, n_vcpus=1, pages=1500, hot=100, epochs=6) as machine:
        machine.step_by_doorbell()
        while machine.run_epoch():
            result = machine.open_pager().evict(range(0x100, machine.memory.gfn_end))
            assert result.count(EvictOutcome.DONE) > 90
            assert result.count(EvictOutcome.ERROR) == 0
        assert machine.wait(DEADLINE_S) == 0


@pytest.mark.requires_kvm
def test_resident_limit_is_held_by_the_fault_handler() -> None:
    limit = 2500
    with hotcold() as machine:
        machine.open_pager().set_limit(limit * 4096)
        machine.start()
        until(lambda: machine.doorbells >= 20, "twenty epochs under the limit")
        counters = machine.open_pager().counters()
        assert machine.error is None
        assert counters["direct_evictions"] > PAGES - limit
        assert counters["over_limit"] == 0
        machine.pause()
        # A batch of 16 may be in flight, no more.
        assert machine.memory.resident_bytes() <= (limit + 16) * PAGE_BYTES
        # A kick gets a vCPU out of its fault; the handler may still be at work on it.
        until(
            lambda: (
                machine.open_pager().counters()["resident_pages"] * PAGE_BYTES
                == machine.memory.resident_bytes()
            ),
            "counters and memory to agree",
        )


@pytest.mark.requires_kvm
def test_shrinking_evicts_what_was_not_young_first() -> None:
    with hotcold(n_vcpus=1, hot=1000, cold=0, scan_every=0, epochs=12) as machine:
        machine.step_by_doorbell()
        tracker = machine.use_tracker("guestpt")
        for _ in range(4):
            machine.run_epoch()
            young = tracker.harvest(0, machine.memory.gfn_end)
            machine.open_pager().note_young(young)
            tracker.rearm(0, machine.memory.gfn_end, young)
        limit = 2000
        machine.open_pager().set_limit(limit * 4096)
        before = machine.open_pager().counters()["resident_pages"]
        assert machine.open_pager().shrink().evicted >= before - limit
        assert machine.open_pager().counters()["resident_pages"] <= limit
        assert machine.open_pager().shrink().evicted == 0
        hot = START + PAGES // 4 + np.arange(1000)
        assert machine.memory.resident()[hot].all()
        while machine.run_epoch():
            pass
        assert machine.wait(DEADLINE_S) == 0


@pytest.mark.requires_kvm
def test_named_victims_go_first_at_the_limit() -> None:
    with hotcold(n_vcpus=1, hot=100, cold=4, scan_every=0) as machine:
        machine.step_by_doorbell()
        machine.run_epoch()
        victims = START + np.arange(3000, 3400)
        machine.open_pager().set_victims(victims)
        machine.open_pager().arm()
        machine.open_pager().evict(START + np.arange(PAGES // 4, PAGES // 4 + 50))
        machine.open_pager().set_limit((machine.open_pager().counters()["resident_pages"]) * 4096)
        machine.run_epoch()
        states = machine.open_pager().states()
        gone = np.flatnonzero(states == PageState.EVICTED)
        assert gone.size >= 50
        assert np.isin(gone, victims).mean() > 0.9


@pytest.mark.parametrize("engine", ENGINES)
def test_alias_access_faults_an_evicted_page_in(engine: str) -> None:
    with hotcold(engine, n_vcpus=1, epochs=4) as machine:
        machine.step_by_doorbell()
        machine.run_epoch()
        gfn = START + 4000
        gpa = gfn * PAGE_BYTES
        before = bytes(machine.memory[gpa : gpa + PAGE_BYTES])
        assert any(before)
        assert machine.open_pager().evict([gfn, gfn + 1]).count(EvictOutcome.DONE) == 2
        assert machine.open_pager().state(gfn) is PageState.EVICTED
        assert not machine.memory.resident()[gfn : gfn + 2].any()
        # A read of one word brings all of it back; the neighbour stays out.
        assert bytes(machine.memory[gpa + 8 : gpa + 16]) == before[8:16]
        assert machine.open_pager().state(gfn) is PageState.RESIDENT
        assert bytes(machine.memory[gpa : gpa + PAGE_BYTES]) == before
        assert machine.open_pager().state(gfn + 1) is PageState.EVICTED
        # A partial write through a numpy view must not come to lie on zeros.
        machine.open_pager().evict([gfn])
        words = machine.memory.array(gpa, 512, "<u8")
        saved = int.from_bytes(before[:8], "little")
        words[0] = saved
        assert bytes(machine.memory[gpa : gpa + PAGE_BYTES]) == before
        del words
        while machine.run_epoch():
            pass
        assert machine.wait(DEADLINE_S) == 0


@pytest.mark.requires_kvm
def test_vmm_write_that_races_an_eviction_is_kept() -> None:
    """Writes through the alias meet the write protection as the guest's do."""
    with Machine(image_path("hello"), mem_bytes=16 << 20, engine="kvm") as machine:
        gfn = 0x400
        words = machine.memory.array(gfn * PAGE_BYTES, (64, 512), "<u8")
        words[:] = 1
        machine.open_pager().arm()
        stop = False
        import threading

        def evict() -> None:
            while not stop:
                machine.open_pager().evict(np.arange(gfn, gfn + 64))

        thread = threading.Thread(target=evict)
        thread.start()
        try:
            for turn in range(1, 400):
                words[:, 0] = turn
                assert (words[:, 0] == turn).all()
        finally:
            stop = True
            thread.join()
        assert (words[:, 1:] == 1).all()
        assert machine.open_pager().counters()["evictions"] > 0
        del words


@pytest.mark.requires_kvm
def test_live_tables_and_parameters_are_never_evicted() -> None:
    with hotcold(n_vcpus=1, epochs=3) as machine:
        machine.step_by_doorbell()
        machine.run_epoch()
        layout = machine.layout
        for gpa, n_bytes in layout.pinned_ranges:
            gfns = np.arange(gpa // PAGE_BYTES, -(-(gpa + n_bytes) // PAGE_BYTES))
            result = machine.open_pager().evict(gfns)
            assert result.count(EvictOutcome.PINNED) == gfns.size
        assert PARAMS_GPA in [gpa for gpa, _ in layout.pinned_ranges]


@pytest.mark.requires_kvm
def test_full_store_refuses_and_loses_nothing() -> None:
    image = image_path("hotcold")
    params = {"pages": 2000, "hot": 100, "epochs": 5, "same_filled_permille": 0}
    with Machine(
        image,
        mem_bytes=32 << 20,
        engine="kvm",
        params=params,
        store=StoreOptions(limit_bytes=64 << 10),
    ) as machine:
        machine.step_by_doorbell()
        while machine.run_epoch():
            result = machine.open_pager().evict(START + np.arange(2000))
            assert result.count(EvictOutcome.FULL) > 1000
            assert machine.open_pager().counters()["store_bytes"] <= 64 << 10
        assert machine.wait(DEADLINE_S) == 0


@pytest.mark.requires_kvm
def test_store_that_fails_to_take_a_page_leaves_it_resident() -> None:
    with hotcold(n_vcpus=1, epochs=4) as machine:
        machine.step_by_doorbell()
        machine.run_epoch()
        machine.open_pager().inject_failures(stores=10)
        result = machine.open_pager().evict(START + np.arange(100))
        assert result.count(EvictOutcome.ERROR) == 10
        assert result.count(EvictOutcome.DONE) == 90
        assert machine.open_pager().counters()["errors"] == 10
        assert machine.memory.resident()[START : START + 10].all()
        while machine.run_epoch():
            pass
        assert machine.wait(DEADLINE_S) == 0


@pytest.mark.requires_kvm
def test_store_that_cannot_give_a_page_back_stops_the_vm() -> None:
    with hotcold(n_vcpus=1, scan_every=2, scan_epochs=2) as machine:
        machine.step_by_doorbell()
        machine.run_epoch()
        machine.open_pager().evict(START + np.arange(PAGES))
        machine.open_pager().inject_failures(loads=1)
        machine.step_by_doorbell(False)
        with pytest.raises(LostPageError, match=r"machine check: .* gfn 0x") as caught:
            machine.wait(DEADLINE_S)
        assert machine.open_pager().counters()["lost_pages"] == 1
        assert machine.open_pager().lost_gfns() == caught.value.gfns
        assert machine.open_pager().state(caught.value.gfns[0]) is PageState.LOST


@pytest.mark.requires_kvm
def test_incompressible_and_same_filled_pages() -> None:
    with Machine(image_path("hello"), mem_bytes=16 << 20, engine="kvm") as machine:
        gfn = 0x400
        pages = machine.memory.array(gfn * PAGE_BYTES, (12, 512), "<u8")
        noise = np.random.default_rng(1).integers(0, 2**63, (4, 512), dtype=np.uint64)
        pages[0:4] = noise
        pages[4:8] = 0x1122334455667788
        pages[8:12] = np.arange(512) // 64
        machine.open_pager().evict(np.arange(gfn, gfn + 12))
        counters = machine.open_pager().counters()
        assert counters["raw_pages"] == 4
        assert counters["same_filled_pages"] == 4
        sizes = [machine.open_pager().stored_bytes(gfn + i) for i in range(12)]
        assert sizes[:4] == [4096] * 4
        assert sizes[4:8] == [8] * 4
        assert all(0 < size < 1024 for size in sizes[8:])
        assert np.array_equal(pages[0:4], noise)
        assert (pages[4:8] == 0x1122334455667788).all()
        assert (pages[8:12] == np.arange(512) // 64).all()
        assert machine.open_pager().counters()["store_bytes"] == 0
        del pages


def test_bad_gfns_change_nothing() -> None:
    with Machine(image_path("hello"), mem_bytes=4 << 20, engine="emulated") as machine:
        with pytest.raises(LayoutError, match="gfn 0x400 is in no memory region"):
            machine.open_pager().evict([0x110, 0x400])
        assert machine.open_pager().counters()["evictions"] == 0


def a_fault_waits() -> bool:
    """Whether a userfaultfd of this process holds a fault that nobody has read."""
    poll = select.poll()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.readlink().name == "anon_inode:[userfaultfd]":
                poll.register(int(path.name), select.POLLIN)
    return bool(poll.poll(0))


@pytest.mark.requires_kvm
def test_stop_while_a_vcpu_waits_for_a_page() -> None:
    """A page that never comes must not keep a machine from stopping."""
    with hotcold(n_vcpus=1, scan_every=2, scan_epochs=2) as machine:
        machine.step_by_doorbell()
        machine.run_epoch()
        machine.open_pager().evict(START + np.arange(PAGES))
        machine.open_pager().stop()
        machine.step_by_doorbell(False)
        until(a_fault_waits, "the vCPU waits for a page")
        machine.stop()
        assert not machine.running


@pytest.mark.requires_kvm
def test_latency_histogram_counts_fault_ins_alone() -> None:
    with hotcold(n_vcpus=1, epochs=4) as machine:
        machine.open_pager().arm()
        machine.step_by_doorbell()
        machine.run_epoch()
        before = machine.open_pager().counters()
        assert before["zero_fills"] > 0
        assert sum(before["latency_ns"]) == before["latency_sum_ns"] == 0
        machine.open_pager().evict(START + np.arange(PAGES))
        while machine.run_epoch():
            pass
        counters = machine.open_pager().counters()
        buckets = counters["latency_ns"]
        assert sum(buckets) == counters["fault_ins"] > 0
        least = sum(count << bucket for bucket, count in enumerate(buckets))
        assert least <= counters["latency_sum_ns"] < 2 * least
