"""Every request, through the real client and socket."""

from __future__ import annotations

import shutil
import subprocess
import threading

import numpy as np
import pytest
from waiting import DEADLINE_S

from kvmhost.bitmap import pack
from kvmhost.control.client import Client
from kvmhost.control.routes import problem_of
from kvmhost.control.schema import LeaseRequest
from kvmhost.errors import (
    CapabilityError,
    ControlError,
    IoctlError,
    LayoutError,
    PagerError,
    VmGoneError,
)

GFN_HIGH = 0x4000


@pytest.fixture
def vm(serve):
    serve()
    with Client("fake", timeout_s=10) as client:
        yield client


def refused(kind, call, *args, **kwargs):
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is kind
    return caught.value


def test_state(vm, machine):
    state = vm.state()
    assert (state.name, state.engine, state.image) == ("fake", "fake", "fake.elf")
    assert state.mem_bytes == 5 << 20
    assert state.vcpus[0].epoch == 1
    assert state.params == {"seed": 1}
    assert (state.running, state.paused, state.status, state.tracker) == (True, False, None, None)
    machine.running, machine.status, machine.error = False, 3, LayoutError("why")
    state = vm.state()
    assert (state.running, state.status, state.error) == (False, 3, "why")


def test_memory(vm, machine):
    found = vm.memory_map()
    assert [(m.slot, m.gfn_start, m.n_pages) for m in found.memslots] == [
        (0, 0, 1024),
        (1, GFN_HIGH, 256),
    ]
    assert found.gfn_end == GFN_HIGH + 256
    assert found.memslots[1].hva == machine.memory.regions[1].guest_address
    assert found.pinned[0].gfn_start == 1


def test_resident_is_by_gfn_and_skips_the_hole(vm, machine):
    machine.memory[0x3000:0x3001] = b"x"
    machine.memory[(GFN_HIGH + 5) << 12 : ((GFN_HIGH + 5) << 12) + 1] = b"x"
    assert np.flatnonzero(vm.resident()).tolist() == [3, GFN_HIGH + 5]
    assert np.flatnonzero(vm.resident(2, 10)).tolist() == [1]
    assert np.flatnonzero(vm.resident(GFN_HIGH - 1, 100)).tolist() == [6]
    assert vm.state().resident_bytes == 8192


def test_the_evidence_of_a_tracker_comes_along(vm, machine):
    assert vm.harvest().young.provenance.evidence == ""
    machine.use_tracker().evidence = "KVM shadows the tables (bits set again: after a zap 32 of 32)"
    assert vm.harvest().young.provenance.evidence == machine.tracker.evidence


def test_harvest_clears_and_rearms_what_it_cleared(vm, machine):
    machine.use_tracker().young = {5, 70, GFN_HIGH}
    found = vm.harvest()
    bitmap = found.young
    assert bitmap.gfns().tolist() == [5, 70, GFN_HIGH]
    assert bitmap.n_pages == GFN_HIGH + 256
    assert bitmap.coarse is None
    source = bitmap.provenance
    assert (source.tracker, source.table_format) == ("guestpt", "npt")
    assert found.harvest_ns > 0
    assert machine.tracker.rearmed == [(0, GFN_HIGH + 256, [5, 70, GFN_HIGH])]
    second = vm.harvest().young
    assert second.count() == 0
    assert second.provenance.window_start_ns == source.window_end_ns
    assert second.provenance.window_end_ns > source.window_end_ns
    assert vm.counters().harvest.harvests == 2
    assert vm.counters().harvest.n_young == 3
    machine = vm.counters().machine
    assert (machine.serial_bytes, machine.serial_lost_bytes) == (27, 4)


def test_harvest_without_clear_changes_nothing(vm, machine):
    machine.use_tracker().young = {5}
    for _ in range(2):
        assert vm.harvest(0, 64, clear=False).young.gfns().tolist() == [5]
    assert machine.tracker.rearmed == []


def test_harvest_with_mask_clears_only_that(vm, machine):
    machine.use_tracker().young = {5, 6}
    mask = np.zeros(100, bool)
    mask[6] = True
    assert vm.harvest(0, 100, mask=pack(mask)).young.gfns().tolist() == [5, 6]
    assert machine.tracker.rearmed == [(0, 100, [6])]
    assert vm.harvest(0, 100).young.gfns().tolist() == [5]


def test_rearm_kinds(vm, machine):
    vm.harvest(0, 64, rearm="none")
    assert machine.tracker.rearmed == []
    vm.harvest(0, 64, rearm="all")
    assert machine.tracker.rearmed == [(0, 64, None)]


def test_a_sample_clears_every_page_once_in_its_turns(vm, machine):
    young = set(range(64))
    armed = []
    for _ in range(4):
        machine.use_tracker().young = set(young)
        assert vm.harvest(0, 64, rearm="sample", fraction=0.25).young.count() == 64
        # Another range has turns of its own, and a look takes nobody's.
        vm.harvest(100, 64, rearm="sample", fraction=0.25)
        vm.harvest(0, 64, rearm="sample", fraction=0.25, clear=False)
        machine.tracker.rearmed, done = [], machine.tracker.rearmed
        first = next(gfns for start, _, gfns in done if start == 0)
        assert set(first) == young - {g for g in machine.tracker.young if g < 64}
        armed += first
    assert sorted(armed) == sorted(young)


def test_a_sample_and_a_mask_clear_what_both_hold(vm, machine):
    mask = np.arange(64) < 32
    cleared = []
    for _ in range(8):
        machine.use_tracker().young = set(range(64))
        vm.harvest(0, 64, rearm="sample", mask=pack(mask))
        cleared += sorted(set(range(64)) - machine.tracker.young)
    assert sorted(cleared) == list(range(32))


def test_bad_samples(vm):
    for fraction in (0.0, -1.0, 1.5, 1e-9):
        assert "fraction" in str(
            refused(LayoutError, vm.harvest, 0, 5, rearm="sample", fraction=fraction)
        )
    assert "fraction" in str(refused(LayoutError, vm.harvest, 0, 5, rearm="young", fraction=0.5))


def test_auto_keeps_the_tracker_in_use(vm):
    assert vm.harvest(tracker="pagemap").young.provenance.tracker == "pagemap"
    assert vm.harvest().young.provenance.tracker == "pagemap"
    assert vm.state().tracker == "pagemap"
    assert vm.harvest(tracker="guestpt").young.provenance.tracker == "guestpt"


def test_bad_harvests(vm):
    assert "100 pages need uint64, shape (2,)" in str(
        refused(LayoutError, vm.harvest, 0, 100, mask=np.zeros(1, np.uint64))
    )
    with pytest.raises(LayoutError, match="mask of 8 bytes: 100 pages need 16"):
        vm._call("POST", "harvest", params={"n_pages": 100}, content=bytes(8))
    assert "memory ends at" in str(refused(LayoutError, vm.harvest, 0, 1 << 40))
    assert refused(LayoutError, vm.harvest, -1, 5).field == "gfn_start"
    assert "rearm" in str(refused(LayoutError, vm.harvest, 0, 5, rearm="x"))
    error = refused(CapabilityError, vm.harvest, tracker="broken")
    assert "take another" in str(error)


def test_evict_restore_and_lookup(vm, machine):
    report = vm.evict([7, 1, 7, GFN_HIGH], each=True)
    assert (report.n_pages, report.done) == (4, 2)
    assert report.outcomes["pinned"] == 1
    assert report.each == bytes([0, 1, 2, 0])
    page = vm.page(GFN_HIGH)
    assert (page.slot, page.slot_offset_bytes, page.state) == (1, 0, "evicted")
    assert (page.stored_bytes, page.resident, page.pinned) == (8, False, False)
    assert vm.page(1).pinned
    assert vm.restore(0, 64).restored_pages == 1
    assert vm.page(7).state == "resident"
    assert vm.counters().pager == {"evictions": 1}


def test_drain_brings_all_back_and_lifts_the_limit(vm, machine):
    vm.set_limit(1 << 20)
    vm.evict([7, 9, GFN_HIGH])
    report = vm.drain()
    assert (report.restored_pages, report.lost_pages, report.left_pages) == (3, 0, 0)
    assert vm.page(7).state == "resident"
    assert vm.state().resident_max_bytes == 0
    assert machine.open_pager().resident_max_bytes == 0
    assert vm.drain().restored_pages == 0


def test_drain_beside_a_lease_holder_needs_force(vm, machine, serve):
    vm.evict([7, 9])
    holder = Client(vm.path)
    with holder:
        holder.take_lease(LeaseRequest("keeper"))
        with pytest.raises(ControlError, match=r"managed by keeper .* may evict again") as caught:
            vm.drain()
        assert caught.value.status == 423
        assert machine.open_pager().out == {7, 9}
        assert holder.drain().restored_pages == 2
        vm.evict([7])
        assert vm.drain(force=True).restored_pages == 1


def test_drain_of_a_vm_that_never_evicted_makes_no_pager(vm, machine):
    machine.pager_problem = CapabilityError("userfaultfd", "one", "none", "get one")
    report = vm.drain()
    assert (report.restored_pages, report.lost_pages, report.left_pages) == (0, 0, 0)


def test_swap_actuator_that_the_host_lacks(vm):
    assert refused(CapabilityError, vm.evict, [7], actuator="swap").remedy.startswith("add swap")
    with pytest.raises(LayoutError, match="actuator"):
        vm.evict([7], actuator="tape")


def test_counters_before_any_pager(vm):
    assert vm.counters().pager is None
    assert vm.page(7).state == "resident"


@pytest.mark.parametrize("gfn", [1024, GFN_HIGH - 1, GFN_HIGH + 256, 1 << 51, -1])
def test_gfn_outside_memory_is_named(vm, machine, gfn):
    error = refused(LayoutError, vm.evict, [5, gfn])
    assert error.field == "gfns[1]"
    assert hex(gfn % (1 << 64)) in str(error)
    assert machine._pager.out == set()
    refused(LayoutError, vm.page, gfn)
    refused(LayoutError, vm.restore, gfn)


def test_restore_across_a_hole_is_refused(vm):
    refused(LayoutError, vm.restore, 1020, 8)


def test_limit_and_victims(vm, machine):
    assert vm.set_limit(10 * 4096 + 5) == 10 * 4096
    assert machine._pager.resident_max_bytes == 10 * 4096
    assert vm.state().resident_max_bytes == 10 * 4096
    assert vm.set_victims(np.array([9, 8, 7])) == 3
    assert machine._pager.victims == [9, 8, 7]
    state = vm.shrink(5 * 4096)
    assert (state.resident_max_bytes, state.evicted_pages, state.over_pages) == (5 * 4096, 7, 2)
    assert machine._pager.resident_max_bytes == 5 * 4096
    assert vm.set_limit(0) == 0
    refused(LayoutError, vm.set_limit, 100)
    refused(LayoutError, vm.set_victims, [1 << 40])


def test_pause_resume_stop(vm, machine):
    assert vm.pause().paused
    assert not vm.resume().paused
    assert not vm.resume().paused
    assert not vm.stop().running


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PagerError("no"), 409),
        (IoctlError("UFFDIO_COPY", 28), 507),
        (IoctlError("UFFDIO_COPY", 14), 500),
        (CapabilityError("userfaultfd", "it", "EPERM", "run as root"), 501),
    ],
)
def test_pager_trouble(vm, machine, error, status):
    machine._pager.error = error
    found = refused(type(error), vm.evict, [5])
    assert (str(found), vars(found)) == (str(error), vars(error))
    assert problem_of(error).status == status


def test_no_pager_says_what_to_do(vm, machine):
    machine.pager_problem = CapabilityError("userfaultfd", "it", "EPERM", "run as root")
    for call in (lambda: vm.evict([5]), lambda: vm.set_limit(8192), lambda: vm.set_victims([5])):
        assert refused(CapabilityError, call).remedy == "run as root"


def test_a_bug_is_no_leak_of_internals(vm, machine, caplog):
    machine._pager.error = ZeroDivisionError("secret")
    error = refused(ControlError, vm.evict, [5])
    assert error.status == 500
    assert "secret" not in error.problem
    assert "ZeroDivisionError" in caplog.text


def test_state_answers_while_a_harvest_hangs(vm, machine):
    inside, leave = threading.Event(), threading.Event()

    def hold():
        inside.set()
        assert leave.wait(DEADLINE_S)

    machine.hold = hold
    thread = threading.Thread(target=vm.harvest)
    thread.start()
    try:
        assert inside.wait(DEADLINE_S)
        assert vm.state().running
        assert vm.page(5).gfn == 5
    finally:
        leave.set()
        thread.join(DEADLINE_S)
    assert vm.counters().harvest.harvests == 1


def test_client_without_a_vm():
    with Client("nobody") as client, pytest.raises(VmGoneError, match=r"'nobody'.*nothing answers"):
        client.state()


def test_client_of_a_vm_that_went_away(serve):
    server = serve()
    with Client(server.path) as client:
        client.state()
        server.close()
        with pytest.raises(VmGoneError):
            client.state()


def test_client_outlives_a_restart_of_the_vm(serve):
    server = serve()
    with Client("fake") as client:
        client.state()
        server.close()
        serve()
        assert client.state().running


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")
def test_curl(serve):
    path = serve().path
    run = subprocess.run(
        ["curl", "-sS", "--unix-socket", str(path), "http://vm/v1/state"],
        capture_output=True,
        check=True,
        timeout=DEADLINE_S,
    )
    assert b'"name":"fake"' in run.stdout
