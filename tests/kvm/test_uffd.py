"""The uffd tracker: exact bits, order and time of first touches, one reader at a time."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
from waiting import DEADLINE_S, until

from kvmhost.bitmap import pack
from kvmhost.errors import CapabilityError, IoctlError, LayoutError
from kvmhost.guests import image_path
from kvmhost.guests.workloads import touch_gfns
from kvmhost.machine import Machine
from kvmhost.memory.layout import HIGH_GPA, LOW_END_GPA
from kvmhost.pager.userfault import Userfault
from kvmhost.trackers.uffd import UffdTracker

pytestmark = pytest.mark.requires_uffd

MEM_BYTES = 48 << 20
START, PAGES = 1029, 2043
ENGINES = [pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]


def touch_machine(engine: str, n_vcpus: int = 1, **params: int) -> Machine:
    given = {"gfn_start": START, "pages": PAGES, "epochs": 0} | params
    machine = Machine(
        image_path("touch"), mem_bytes=MEM_BYTES, engine=engine, n_vcpus=n_vcpus, params=given
    )
    machine.step_by_doorbell()
    return machine


PATTERNS = {
    "reads": {},
    "writes-every-3rd": {"stride": 3, "write": 1},
    "backwards": {"pattern": 1, "stride": 2},
    "random": {"pattern": 2, "count": 500, "seed": 5},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bits_equal_prediction(engine: str, pattern: str) -> None:
    with touch_machine(engine, **PATTERNS[pattern]) as machine:
        used = machine.use_tracker("uffd")
        for epoch in range(4):
            assert machine.run_epoch()
            young = used.harvest(START - 500, PAGES + 1000)
            assert young.gfns().tolist() == touch_gfns(machine.params, epoch).tolist()
            assert young.provenance.tracker == "uffd"
            assert used.harvest(START - 500, PAGES + 1000).count() == 0
        assert used.counters()["errors"] == 0


@pytest.mark.requires_kvm
def test_two_vcpus_on_the_same_pages() -> None:
    """hotcold checks every byte it reads: a page served wrongly ends it."""
    params = {"pages": 1500, "hot": 700, "epochs": 12, "scan_every": 3, "scan_epochs": 2}
    image = image_path("hotcold")
    with Machine(image, mem_bytes=MEM_BYTES, engine="kvm", n_vcpus=2, params=params) as machine:
        used = machine.use_tracker("uffd")
        machine.start()
        while machine.running:
            used.harvest(0, machine.memory.gfn_end)
        assert machine.wait(DEADLINE_S) == 0
        assert used.counters()["errors"] == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("write", [0, 1])
def test_order_is_the_guests_order(engine: str, write: int) -> None:
    params = {"pattern": 1, "pages": 200, "write": write}
    with touch_machine(engine, **params) as machine:
        used = machine.use_tracker("uffd")
        assert machine.run_epoch()
        used.harvest(0, machine.memory.gfn_end)
        used.take_order()
        before = time.monotonic_ns()
        assert machine.run_epoch()
        after = time.monotonic_ns()
        order = used.take_order()
        inside = (order.gfns >= START) & (order.gfns < START + 200)
        # From the last page down, as the guest goes; code and tables are seen as well.
        assert order.gfns[inside].tolist() == list(range(START + 199, START - 1, -1))
        assert order.writes[inside].tolist() == [bool(write)] * 200
        assert (np.diff(order.times_ns.astype(np.int64)) >= 0).all()
        assert before < order.times_ns[0] <= order.times_ns[-1] < after
        assert order.dropped == 0
        assert used.take_order().gfns.size == 0


@pytest.mark.parametrize("entries", [0, 1, 100])
def test_a_full_log_drops_and_counts_but_bits_stay_exact(entries: int) -> None:
    with touch_machine("auto") as machine:
        used = UffdTracker(machine.memory, machine.open_userfault(), log_entries=entries)
        used.start()
        try:
            assert machine.run_epoch()
            young = used.harvest(START, PAGES)
            assert young.gfns().tolist() == touch_gfns(machine.params, 0).tolist()
            order = used.take_order()
            assert order.gfns.size == entries
            assert order.dropped == used.counters()["first"] - entries
        finally:
            used.stop()


def test_the_log_goes_round() -> None:
    with touch_machine("auto", pages=60) as machine:
        used = UffdTracker(machine.memory, machine.open_userfault(), log_entries=100)
        used.start()
        try:
            for _ in range(5):
                assert machine.run_epoch()
                used.harvest(START, 60)
                gfns = used.take_order().gfns
                gfns = gfns[(gfns >= START) & (gfns < START + 60)]
                assert gfns.tolist() == list(range(START, START + 60))
        finally:
            used.stop()


def test_clear_false_and_masks() -> None:
    with touch_machine("auto") as machine:
        used = machine.use_tracker("uffd")
        machine.run_epoch()
        assert used.harvest(START, PAGES, clear=False).count() == PAGES
        asked = np.zeros(PAGES, dtype=bool)
        asked[np.random.default_rng(2).choice(PAGES, 777, replace=False)] = True
        assert used.harvest(START, PAGES, mask=pack(asked)).count() == PAGES
        left = used.harvest(START, PAGES, clear=False)
        assert np.array_equal(left.as_bool(), ~asked)
        # Cleared pages fault again, the others do not.
        before = used.counters()["first"]
        machine.run_epoch()
        assert used.harvest(START, PAGES).count() == PAGES
        assert 777 <= used.counters()["first"] - before < 777 + 20


@pytest.mark.requires_kvm
def test_no_touch_is_lost_while_the_guest_runs_free() -> None:
    epochs, pages = 800, 8192
    with touch_machine("kvm", pattern=2, count=4, pages=pages, epochs=epochs) as machine:
        used = machine.use_tracker("uffd")
        assert machine.run_epoch()
        seen = used.harvest(START, pages).as_bool()
        machine.step_by_doorbell(False)
        while machine.running:
            seen |= used.harvest(START, pages).as_bool()
        assert machine.wait(DEADLINE_S) == 0
        seen |= used.harvest(START, pages).as_bool()
        expected = np.unique(
            np.concatenate([touch_gfns(machine.params, epoch) for epoch in range(epochs)])
        )
        assert (np.flatnonzero(seen) + START).tolist() == expected.tolist()


def test_an_armed_pager_and_the_tracker_refuse_each_other() -> None:
    with touch_machine("auto") as machine:
        used = machine.use_tracker("uffd")
        machine.run_epoch()
        with pytest.raises(CapabilityError, match="uffd tracker reads them"):
            machine.open_pager().evict([START])
        assert used.harvest(START, PAGES).count() == PAGES
        # Another tracker lets the userfaultfd go; then the pager may have it.
        machine.use_tracker("guestpt")
        assert machine.open_pager().evict([START]).by_name()["done"] == 1
        with pytest.raises(CapabilityError, match="pager reads them"):
            machine.use_tracker("uffd")
        other = machine.use_tracker("guestpt")
        assert machine.run_epoch()
        assert other.harvest(START, PAGES).count() == PAGES


def test_after_stop_nothing_is_served_and_nobody_waits() -> None:
    with touch_machine("auto") as machine:
        used = machine.use_tracker("uffd")
        machine.run_epoch()
        used.harvest(START, PAGES)
        used.stop()
        used.stop()
        before = used.counters()
        assert machine.run_epoch()
        assert used.counters() == before
        used.start()
        assert used.harvest(START, PAGES).count() == 0
        assert machine.run_epoch()
        assert used.harvest(START, PAGES).count() == PAGES


def test_pagemap_is_exact_after_uffd_let_go() -> None:
    with touch_machine("auto", stride=3) as machine:
        machine.use_tracker("pagemap")
        machine.use_tracker("uffd")
        machine.run_epoch()
        used = machine.use_tracker("pagemap")
        machine.run_epoch()
        young = used.harvest(START, PAGES)
        assert young.gfns().tolist() == touch_gfns(machine.params, 1).tolist()


@pytest.mark.usefixtures("nothing_left")
def test_stopping_while_guests_fault() -> None:
    # Often: a fault that queues while the registration goes away is a narrow window.
    for _ in range(100):
        with touch_machine("auto", pages=8000) as machine:
            used = machine.use_tracker("uffd")
            machine.step_by_doorbell(False)
            machine.start()
            until(lambda used=used: used.counters()["messages"] > 50, "faults")
            machine.use_tracker("guestpt")
            machine.stop()


def test_older_kernels_are_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Userfault, "minor_faults", False)
    support = UffdTracker.probe()
    assert not support.works
    assert "5.14" in support.reason
    with touch_machine("auto") as machine, pytest.raises(CapabilityError, match="minor"):
        machine.use_tracker("uffd")


def test_bad_arguments_are_refused() -> None:
    with touch_machine("auto") as machine:
        used = machine.use_tracker("uffd")
        with pytest.raises(LayoutError):
            used.harvest(-1, 5)
        with pytest.raises(LayoutError):
            used.harvest(0, 64, mask=np.zeros(2, dtype=np.uint64))
        with pytest.raises(IoctlError, match="busy"):
            used.start()


def anonymous_bytes() -> int:
    found = re.search(r"^Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def burst(pages: int, epochs: int, seconds: float) -> None:
    """``pages`` first touches an epoch by two vCPUs: none lost, none waits for ever."""
    gfn_start, mem_bytes = 1024, (pages + 4096) * 4096
    if mem_bytes > LOW_END_GPA:  # above the tables, which end the low memory
        gfn_start, mem_bytes = HIGH_GPA >> 12, LOW_END_GPA + pages * 4096
    params = {"gfn_start": gfn_start, "pages": pages, "epochs": 0, "write": 1}
    with Machine(
        image_path("touch"), mem_bytes=mem_bytes, engine="kvm", n_vcpus=2, params=params
    ) as machine:
        machine.step_by_doorbell()
        used = machine.use_tracker("uffd")
        before = anonymous_bytes()
        for _ in range(epochs):
            assert machine.run_epoch(timeout_s=seconds)
            assert used.harvest(gfn_start, pages).count() == pages
        counters = used.counters()
        assert counters["errors"] == 0
        assert counters["first"] >= pages * epochs
        # What is kept is bounded: a log of one entry for 8 pages, and a bit a page.
        assert anonymous_bytes() - before < mem_bytes // 1000 + (1 << 20)
        order = used.take_order()
        assert order.gfns.size <= mem_bytes // 4096 // 8
        assert order.gfns.size + order.dropped == counters["first"]
        # And free-running, with harvests that clear under the guest's hands: it goes on.
        machine.step_by_doorbell(False)
        seen = machine.doorbells
        while machine.doorbells < seen + 2:
            used.harvest(gfn_start + pages // 2, 512)
            assert used.counters()["errors"] == 0
        machine.pause()


@pytest.mark.requires_kvm
def test_a_burst_of_100_000_faults() -> None:
    burst(25_000, 4, 60)


@pytest.mark.requires_kvm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_burst_of_a_million_faults() -> None:
    """One window of a million pages: 4 GiB of guest memory, about a minute and a half."""
    free = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    assert free is not None
    if int(free[1]) < 6 << 20:
        pytest.skip(f"needs 6 GiB of free memory, {int(free[1]) >> 10} MiB are there")
    burst(1_000_000, 1, 600)
