"""The dirty rings: several vCPUs, overflow, reset; the same answers as the dirty log."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from waiting import DEADLINE_S

from kvmhost.bitmap import n_words, pack
from kvmhost.errors import CapabilityError, IoctlError, LayoutError
from kvmhost.guests import image_path
from kvmhost.guests.workloads import touch_gfns
from kvmhost.kvm import DirtyRings, System
from kvmhost.machine import Machine
from kvmhost.trackers.guestpt import GuestptTracker

pytestmark = [pytest.mark.requires_kvm, pytest.mark.requires_cap("DIRTY_LOG_RING")]

MEM_BYTES = 48 << 20
START, PAGES = 1029, 4000


def ring_machine(entries: int = 4096, n_vcpus: int = 1, **params: int) -> Machine:
    given = {"gfn_start": START, "pages": PAGES, "epochs": 0, "write": 1} | params
    machine = Machine(
        image_path("touch"),
        mem_bytes=MEM_BYTES,
        engine="kvm",
        n_vcpus=n_vcpus,
        params=given,
        dirty_ring_entries=entries,
    )
    machine.step_by_doorbell()
    return machine


def counters(machine: Machine) -> dict[str, int]:
    return machine.engine.rings.counters()


@pytest.mark.parametrize("n_vcpus", [1, 2, 4])
@pytest.mark.parametrize("params", [{}, {"stride": 3}, {"pattern": 2, "count": 900}])
def test_ring_equals_prediction(params: dict[str, int], n_vcpus: int) -> None:
    with ring_machine(n_vcpus=n_vcpus, **params) as machine:
        used = machine.use_tracker("dirty")
        assert used.table_format == "dirty-ring"
        for epoch in range(4):
            assert machine.run_epoch()
            written = used.harvest(START - 500, PAGES + 1000)
            assert written.gfns().tolist() == touch_gfns(machine.params, epoch).tolist()
            assert used.harvest(START - 500, PAGES + 1000).count() == 0
        assert counters(machine)["foreign"] == 0


@pytest.mark.parametrize("n_vcpus", [1, 2])
def test_full_rings_are_emptied_by_the_vcpus_and_lose_nothing(n_vcpus: int) -> None:
    """4000 pages through rings of 1024 entries and nobody who harvests meanwhile."""
    with ring_machine(entries=1024, n_vcpus=n_vcpus) as machine:
        used = machine.use_tracker("dirty")
        for epoch in range(3):
            assert machine.run_epoch()
            assert counters(machine)["full"] >= (epoch + 1) * (3 if n_vcpus == 1 else 1)
            written = used.harvest(START, PAGES)
            assert written.gfns().tolist() == touch_gfns(machine.params, epoch).tolist()
        assert counters(machine)["entries"] >= 3 * PAGES


def test_reset_arms_pages_again_and_only_those() -> None:
    with ring_machine(pages=500) as machine:
        used = machine.use_tracker("dirty")
        machine.run_epoch()
        assert used.harvest(START, 500).count() == 500
        before = counters(machine)
        assert before["resets"] >= 1
        # Armed: every page makes an entry again. Not harvested: none makes a second one.
        machine.run_epoch()
        machine.run_epoch()
        assert used.harvest(START, 500).count() == 500
        assert counters(machine)["entries"] - before["entries"] in range(500, 520)


def test_harvests_without_clear_and_with_a_mask() -> None:
    with ring_machine() as machine:
        used = machine.use_tracker("dirty")
        machine.run_epoch()
        assert used.harvest(START, PAGES, clear=False).count() == PAGES
        asked = np.zeros(PAGES, dtype=bool)
        asked[np.random.default_rng(2).choice(PAGES, 1234, replace=False)] = True
        assert used.harvest(START, PAGES, mask=pack(asked)).count() == PAGES
        left = used.harvest(START, PAGES, clear=False)
        assert np.array_equal(left.as_bool(), ~asked)
        assert used.harvest(START + 77, 1001).count() == (~asked)[77:1078].sum()
        assert used.harvest(START, PAGES).count() == (~asked).sum() - (~asked)[77:1078].sum()


def test_agrees_with_the_dirty_bits_of_the_guests_tables() -> None:
    with ring_machine(pattern=2, count=400) as machine:
        ring = machine.use_tracker("dirty")
        tables = GuestptTracker.for_vm(machine.tracked_vm())
        tables.start()
        tables.table.harvest_dirty(START, PAGES)
        for _ in range(6):
            assert machine.run_epoch()
            from_tables = tables.table.harvest_dirty(START, PAGES)
            written = ring.harvest(START, PAGES)
            assert written.gfns().tolist() == from_tables.gfns().tolist()
            assert written.count() > 0
            tables.rearm(START, PAGES)
        tables.stop()


@pytest.mark.parametrize("n_vcpus", [1, 2])
def test_no_write_is_lost_while_the_guest_runs_free(n_vcpus: int) -> None:
    epochs, pages = 1500, 8192
    with ring_machine(
        entries=256 if n_vcpus == 1 else 1024,
        n_vcpus=n_vcpus,
        pattern=2,
        count=4,
        pages=pages,
        epochs=epochs,
    ) as machine:
        used = machine.use_tracker("dirty")
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


def test_stop_leaves_nothing_behind_and_start_begins_anew() -> None:
    with ring_machine() as machine:
        machine.use_tracker("dirty")
        machine.run_epoch()
        machine.use_tracker("guestpt")
        before = counters(machine)["entries"]
        machine.run_epoch()
        again = machine.use_tracker("dirty")
        assert counters(machine)["entries"] == before
        assert again.harvest(START, PAGES).count() == 0
        machine.run_epoch()
        assert again.harvest(START, PAGES).count() == PAGES


def test_the_log_is_refused_where_there_is_a_ring() -> None:
    with ring_machine() as machine:
        machine.use_tracker("dirty")
        words = np.zeros(n_words(machine.memory.regions[0].n_pages), dtype=np.uint64)
        with pytest.raises(IoctlError) as caught:
            machine.engine.vm.get_dirty_log(0, words)
        assert caught.value.errno == errno.ENXIO


@pytest.mark.parametrize("entries", [1, 255, 1000, 131072, -4])
def test_sizes_that_no_ring_has(entries: int) -> None:
    with pytest.raises(LayoutError, match="power of two"):
        ring_machine(entries=entries)


def test_other_engines_have_no_ring() -> None:
    with pytest.raises(CapabilityError, match="--engine kvm"):
        Machine(image_path("touch"), engine="emulated", dirty_ring_entries=4096)


def test_wrapper_reports_what_is_refused() -> None:
    with System() as system, system.create_vm() as vm:
        rings = DirtyRings(vm.fd, 1024)
        rings.add_slot(100)
        with pytest.raises(IoctlError) as caught:
            rings.add_vcpu(-1)
        assert caught.value.errno == errno.EBADF
        words = np.zeros(4, dtype=np.uint64)
        for slot, first, n_pages in ((1, 0, 1), (0, 90, 11), (0, 101, 0)):
            with pytest.raises(IoctlError) as caught:
                rings.harvest(slot, first, n_pages, True, None, words)
            assert caught.value.errno == errno.ERANGE
        for _ in range(7):
            rings.add_slot(1)
        with pytest.raises(IoctlError) as caught:
            rings.add_slot(1)
        assert caught.value.errno == errno.ENOSPC
        rings.close()
        rings.close()
