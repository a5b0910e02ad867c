"""The VMs of a daemon: found, waited for, refused, taken over and dropped."""

from __future__ import annotations

import gc
import threading
import types
import weakref

from fake_vm import Events, FakeVm, make_daemon
from waiting import DEADLINE_S, until

from kvmhost.errors import CapabilityError, ControlError, VmGoneError
from kvmhost.reclaim.account.events import Dropped, PassReport
from kvmhost.reclaim.pressure.limits import CpuShare
from kvmhost.reclaim.vm import worker as worker_module
from kvmhost.units import Seconds


def test_passes_end_the_daemon(vms):
    events = Events()
    assert make_daemon(["a", "b", "a"], events, passes=3).run()
    assert sorted((e.vm, e.number) for e in events) == [
        (vm, number) for vm in "ab" for number in (1, 2, 3)
    ]
    assert all(vm.given_back for vm in vms.values())


def test_stop_ends_the_daemon(vms):
    events = Events(lambda event: daemon.stop())
    daemon = make_daemon(["a"], events, interval=Seconds(1000))
    assert daemon.run()
    assert len(events) == 1
    daemon.stop()


def test_a_vm_that_goes_away_is_dropped_and_others_go_on(vms):
    vms["a"], vms["b"] = FakeVm("a"), FakeVm("b")

    def then(event):
        if event.vm == "a" and isinstance(event, PassReport):
            vms["a"].trouble["harvest"] = VmGoneError("a", "hung up")
        elif event.vm == "b" and event.number > 3 and events.of(Dropped):
            daemon.stop()

    events = Events(then)
    daemon = make_daemon(["a", "b"], events)
    assert daemon.run()
    assert events.of(Dropped) == [Dropped("a", "hung up", failed=False)]


def test_a_guest_that_ended_is_dropped(vms):
    vms["a"] = FakeVm("a")
    vms["a"].state = lambda: types.SimpleNamespace(running=False, paused=False)
    events = Events()
    assert make_daemon(["a"], events).run()
    assert events[-1] == Dropped("a", "the guest has ended", failed=False)


def test_a_vm_that_is_not_there_fails_without_wait(vms):
    vms["a"] = FakeVm("a")
    vms["a"].trouble["memory"] = VmGoneError("a", "nothing answers")
    events = Events()
    assert not make_daemon(["a"], events).run()
    assert events == [Dropped("a", "nothing answers", failed=True)]


def test_wait_waits_until_it_is_there(vms, monkeypatch):
    monkeypatch.setattr(worker_module, "_RETRY_S", 0.001)
    vms["a"] = vm = FakeVm("a")
    vm.trouble["memory"] = VmGoneError("a", "nothing answers")
    looked = []

    def memory():
        looked.append(1)
        if len(looked) == 3:
            vm.trouble.clear()
        return FakeVm.memory_map(vm)

    vm.memory_map = memory
    assert make_daemon(["a"], Events(), passes=1, wait=True).run()
    assert len(looked) == 3


def test_a_vm_without_a_pager_fails_at_once(vms):
    vms["a"] = FakeVm("a")
    vms["a"].trouble["limit"] = CapabilityError("userfaultfd", "it", "EPERM", "run as root")
    events = Events()
    assert not make_daemon(["a"], events).run()
    assert [e.failed for e in events] == [True]
    assert "run as root" in events[0].reason


def test_refusals_are_retried_and_then_given_up(vms):
    vms["a"] = vm = FakeVm("a")
    vm.trouble["evict"] = ControlError(409, "busy")
    events = Events()
    assert not make_daemon(["a"], events).run()
    assert [e.number for e in events.of(PassReport)] == [1]
    assert events[-1] == Dropped("a", "busy", failed=True)
    assert vm.window == 1 + 5


def test_a_vm_with_another_daemon_is_refused_and_named(vms):
    vms["a"] = FakeVm("a")
    vms["a"].trouble["lease"] = ControlError(423, "looked after by reclaimd other (process 5)")
    events = Events()
    assert not make_daemon(["a"], events).run()
    assert "reclaimd other" in events[0].reason
    assert "--take-over" in events[0].reason


def test_a_vm_that_was_taken_over_is_let_go(vms):
    vms["a"] = FakeVm("a")

    def then(event):
        vms["a"].trouble["state"] = ControlError(423, "the lease was lost; it is with x")

    events = Events(then)
    assert not make_daemon(["a"], events).run()
    assert "it is with x" in events[-1].reason


def test_what_a_daemon_says_to_a_vm(vms):
    assert make_daemon(
        ["a"], Events(), passes=1, name="main", lease=Seconds(2), take_over=True
    ).run()
    asked = vms["a"].lease_asked
    assert (asked.holder, asked.ttl_s, asked.take_over) == ("reclaimd main", 2.0, True)
    assert make_daemon(["a"], Events(), passes=1, interval=Seconds(20)).run()
    assert vms["a"].lease_asked.ttl_s == 60


def test_a_vm_that_is_gone_leaves_nothing_in_the_daemon(vms):
    kept = []

    def then(event):
        if isinstance(event, PassReport):
            kept.append(weakref.ref(daemon.sessions()[0]))
            vms["a"].trouble["state"] = VmGoneError("a", "hung up")

    daemon = make_daemon(["a"], Events(then))
    assert daemon.run()
    # The fake's error has the frames that it went through.
    vms.clear()
    gc.collect()
    assert [ref() for ref in kept] == [None]
    assert daemon.sessions() == []
    assert daemon.context.host._claims == {}
    assert [vm for vm, _, _ in daemon.context.decisions.totals()] == []


def test_patterns_find_vms_that_come_and_let_go_of_those_that_leave(vms, monkeypatch):
    running = ["web1", "db"]
    monkeypatch.setattr("kvmhost.reclaim.daemon.running_names", lambda: list(running))
    monkeypatch.setattr("kvmhost.reclaim.daemon._IGNORE_ENDED_S", 0.0)

    def then(event):
        if isinstance(event, Dropped):
            running.remove(event.vm)
        elif event.vm == "web1" and event.number == 2:
            running.append("web2")
        elif event.vm == "web2" and event.number == 2:
            vms["web1"].trouble["state"] = VmGoneError("web1", "hung up")
        if events.of(Dropped):
            daemon.stop()

    events = Events(then)
    daemon = make_daemon(["web*"], events)
    assert daemon.run()
    assert {e.vm for e in events} == {"web1", "web2"}
    assert events.of(Dropped) == [Dropped("web1", "hung up", failed=False)]


def test_a_long_rest_keeps_the_lease(vms):
    """A limit of a thousandth of a core makes for long rests after short passes."""
    vms["a"] = FakeVm("a")
    daemon = make_daemon(["a"], Events(), lease=Seconds(0.05), interval=Seconds(0.01))
    daemon.context.cpu = CpuShare(0.001)
    daemon.context.cpu._left_s = -1.0
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        until(lambda: vms["a"].renewed >= 5, "the lease is renewed")
    finally:
        daemon.stop()
        thread.join(DEADLINE_S)
    assert vms["a"].window == 1
