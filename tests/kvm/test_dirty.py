"""The dirty tracker: exact against prediction, and against the guest's own dirty bits."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from waiting import DEADLINE_S

from kvmhost.bitmap import n_words, pack
from kvmhost.errors import CapabilityError, IoctlError, LayoutError
from kvmhost.guests import image_path
from kvmhost.guests.workloads import touch_gfns
from kvmhost.kvm import Cap, System
from kvmhost.machine import Machine
from kvmhost.memory.guest import Region
from kvmhost.trackers.dirty import DirtyTracker
from kvmhost.trackers.guestpt import GuestptTracker

pytestmark = [pytest.mark.requires_kvm, pytest.mark.requires_cap("MANUAL_DIRTY_LOG_PROTECT2")]

MEM_BYTES = 48 << 20
# No multiple of 64, so that ranges begin and end inside a word of KVM's log.
START, PAGES = 1029, 2043


def touch_machine(engine: str = "kvm", n_vcpus: int = 1, **params: int) -> Machine:
    given = {"gfn_start": START, "pages": PAGES, "epochs": 0, "write": 1} | params
    machine = Machine(
        image_path("touch"), mem_bytes=MEM_BYTES, engine=engine, n_vcpus=n_vcpus, params=given
    )
    machine.step_by_doorbell()
    return machine


PATTERNS = {
    "all": {},
    "every-3rd": {"stride": 3},
    "backwards": {"pattern": 1},
    "random": {"pattern": 2, "count": 500, "seed": 5},
}


@pytest.mark.parametrize("n_vcpus", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_log_equals_prediction(pattern: str, n_vcpus: int) -> None:
    with touch_machine(n_vcpus=n_vcpus, **PATTERNS[pattern]) as machine:
        used = machine.use_tracker("dirty")
        for epoch in range(4):
            assert machine.run_epoch()
            written = used.harvest(START - 500, PAGES + 1000)
            assert written.gfns().tolist() == touch_gfns(machine.params, epoch).tolist()
            assert written.provenance.tracker == "dirty"
            assert used.harvest(START - 500, PAGES + 1000).count() == 0


def test_reads_of_mapped_pages_are_not_seen() -> None:
    """With nested paging, KVM maps a page that is read for writing too, and logs it then."""
    with touch_machine(write=0) as machine:
        used = machine.use_tracker("dirty")
        assert machine.run_epoch()
        assert used.harvest(START, PAGES).count() in (0, PAGES)
        for _ in range(2):
            assert machine.run_epoch()
            assert used.harvest(START, PAGES).count() == 0


@pytest.mark.parametrize("write", [0, 1])
def test_agrees_with_the_dirty_bits_of_the_guests_tables(write: int) -> None:
    with touch_machine(pattern=2, count=400, write=write) as machine:
        log, tables = (cls.for_vm(machine.tracked_vm()) for cls in (DirtyTracker, GuestptTracker))
        log.start()
        tables.start()
        tables.table.harvest_dirty(START, PAGES)
        mapped: set[int] = set()
        for epoch in range(6):
            assert machine.run_epoch()
            from_log = set(log.harvest(START, PAGES).gfns().tolist())
            from_tables = set(tables.table.harvest_dirty(START, PAGES).gfns().tolist())
            touched = set(touch_gfns(machine.params, epoch).tolist())
            assert from_tables == (touched if write else set())
            # The log also has pages that KVM mapped since: with nested paging it maps a
            # page that is only read for writing too, and logs it then.
            assert from_tables <= from_log <= from_tables | touched - mapped
            mapped |= touched
            tables.rearm(START, PAGES)
        log.stop()
        tables.stop()


def test_clear_false_keeps_everything() -> None:
    with touch_machine(stride=5) as machine:
        used = machine.use_tracker("dirty")
        machine.run_epoch()
        first = used.harvest(START, PAGES, clear=False)
        assert first.gfns().tolist() == touch_gfns(machine.params, 0).tolist()
        assert used.harvest(START, PAGES) == first
        assert used.harvest(START, PAGES).count() == 0


@pytest.mark.parametrize("first", [START, START - 5, START + 64, START + 77])
def test_mask_clears_only_what_is_asked(first: int) -> None:
    n_pages = PAGES - 200
    with touch_machine() as machine:
        used = machine.use_tracker("dirty")
        machine.run_epoch()
        before = used.harvest(0, machine.memory.gfn_end, clear=False).as_bool()
        asked = np.zeros(n_pages, dtype=bool)
        asked[np.random.default_rng(first).choice(n_pages, 700, replace=False)] = True
        used.harvest(first, n_pages, mask=pack(asked))
        after = used.harvest(0, machine.memory.gfn_end, clear=False).as_bool()
        expected = before.copy()
        expected[first : first + n_pages] &= ~asked
        assert np.array_equal(after, expected)


def test_cleared_pages_are_protected_again_and_others_are_not() -> None:
    with touch_machine() as machine:
        used = machine.use_tracker("dirty")
        machine.run_epoch()
        used.harvest(START, 1000)
        assert used.harvest(START, PAGES, clear=False).count() == PAGES - 1000
        machine.run_epoch()
        assert used.harvest(START, PAGES, clear=False).count() == PAGES


def test_stop_switches_logging_off_and_start_begins_anew() -> None:
    with touch_machine() as machine:
        used = machine.use_tracker("dirty")
        machine.run_epoch()
        machine.use_tracker("guestpt")
        vm = machine.engine.vm
        words = np.zeros(n_words(machine.memory.regions[0].n_pages), dtype=np.uint64)
        with pytest.raises(IoctlError) as caught:
            vm.get_dirty_log(0, words)
        assert caught.value.errno == errno.ENOENT
        used.stop()
        again = machine.use_tracker("dirty")
        assert again.harvest(START, PAGES).count() == 0
        machine.run_epoch()
        assert again.harvest(START, PAGES).count() == PAGES


def test_no_write_is_lost_while_the_guest_runs_free() -> None:
    """Pages are written once or seldom, so that a lost bit would not come back."""
    epochs, pages = 1500, 8192
    with touch_machine(pattern=2, count=4, pages=pages, epochs=epochs) as machine:
        used = machine.use_tracker("dirty")
        assert machine.run_epoch()
        seen = used.harvest(START, pages).as_bool()
        machine.step_by_doorbell(False)
        harvests = 0
        while machine.running:
            seen |= used.harvest(START, pages).as_bool()
            harvests += 1
        assert machine.wait(DEADLINE_S) == 0
        seen |= used.harvest(START, pages).as_bool()
        expected = np.unique(
            np.concatenate([touch_gfns(machine.params, epoch) for epoch in range(epochs)])
        )
        assert harvests > 3
        assert (np.flatnonzero(seen) + START).tolist() == expected.tolist()


def test_the_whole_vm_may_be_asked_for_and_no_page_more() -> None:
    with touch_machine() as machine:
        used = machine.use_tracker("dirty")
        machine.run_epoch()
        gfn_end = machine.memory.gfn_end
        with pytest.raises(LayoutError, match=f"memory ends at gfn {gfn_end:#x}"):
            used.harvest(0, gfn_end + 1)
        written = used.harvest(0, gfn_end)
        assert set(touch_gfns(machine.params, 0).tolist()) <= set(written.gfns().tolist())


def test_other_engines_are_refused_with_a_reason() -> None:
    support = DirtyTracker.probe("emulated")
    assert not support.works
    assert "emulated" in support.reason
    with (
        touch_machine("emulated") as machine,
        pytest.raises(CapabilityError, match="--engine kvm"),
    ):
        machine.use_tracker("dirty")


def test_bad_arguments_are_refused() -> None:
    with touch_machine() as machine:
        used = machine.use_tracker("dirty")
        with pytest.raises(LayoutError):
            used.harvest(-1, 5)
        with pytest.raises(LayoutError):
            used.harvest(0, 64, mask=np.zeros(2, dtype=np.uint64))


def test_wrappers_report_what_kvm_refuses() -> None:
    region = Region(0, 1 << 20)
    words = np.zeros(4, dtype=np.uint64)
    with System() as system, system.create_vm() as vm:
        vm.set_memory_region(0, 0, region.n_bytes, region.guest_address)
        for call in (
            lambda: vm.get_dirty_log(0, words),
            lambda: vm.get_dirty_log(7, words),
            lambda: vm.clear_dirty_log(0, 0, 64, words),
        ):
            with pytest.raises(IoctlError) as caught:
                call()
            assert caught.value.errno in (errno.ENOENT, errno.ENXIO, errno.EINVAL)
        with pytest.raises(IoctlError) as caught:
            vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, 1 << 40)
        assert caught.value.errno == errno.EINVAL
        assert "MANUAL_DIRTY_LOG_PROTECT2" in str(caught.value)
        with pytest.raises(LayoutError):
            vm.clear_dirty_log(0, 0, 512, words)
    for call in (
        lambda: vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, 1),
        lambda: vm.get_dirty_log(0, words),
        lambda: vm.clear_dirty_log(0, 0, 64, words),
    ):
        with pytest.raises(IoctlError) as caught:
            call()
        assert caught.value.errno == errno.EBADF
    region.close()
