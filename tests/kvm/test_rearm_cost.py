"""The measured cost of a re-armed page, and the counters that it is multiplied with."""

from __future__ import annotations

import pytest

from kvmhost.errors import StateError
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.trackers import rearmcost

PARAMS = {"pages": 256, "hot": 64, "cold": 0, "epochs": 0, "scan_every": 0}


@pytest.fixture(autouse=True)
def _no_old_figures(monkeypatch):
    monkeypatch.setattr(rearmcost, "_measured", {})


def hot_machine(engine: str) -> Machine:
    machine = Machine(image_path("hotcold"), mem_bytes=6 << 20, params=PARAMS, engine=engine)
    machine.step_by_doorbell()
    return machine


def check_counters(machine: Machine) -> None:
    """Each epoch touches the 64 hot pages and some of the guest's own, which are the same."""
    machine.run_epoch()
    machine.harvest()
    counts = []
    for _ in range(4):
        machine.run_epoch()
        before, vcpu_s = machine.counters().harvest, machine.counters().machine.vcpu_s
        young = machine.harvest().n_young
        after = machine.counters().harvest
        counts.append((young, after.n_retouched - before.n_retouched))
        assert after.n_cleared - before.n_cleared == young
        assert vcpu_s > 0
    # The first window may have pages that were never touched before.
    assert all(again == young >= 64 for young, again in counts[1:])


@pytest.mark.requires_kvm
def test_pages_that_are_touched_again_are_counted() -> None:
    with hot_machine("kvm") as machine:
        check_counters(machine)


def test_pages_that_are_touched_again_are_counted_under_the_emulator() -> None:
    with hot_machine("emulated") as machine:
        check_counters(machine)


def test_pages_that_are_left_alone_cost_nothing() -> None:
    """Only a page that was cleared can cost a fault: with clear=False nothing changes."""
    with hot_machine("emulated") as machine:
        machine.run_epoch()
        machine.harvest()
        machine.run_epoch()
        machine.harvest(clear=False)
        before = machine.counters().harvest
        machine.run_epoch()
        machine.harvest(clear=False)
        assert machine.counters().harvest.n_retouched == before.n_retouched


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_a_fault_that_another_thread_answers_costs_more() -> None:
    kernel, thread = (rearmcost.rearm_cost(name, "kvm") for name in ("guestpt", "uffd"))
    assert (kernel.tracker, thread.tracker) == ("guestpt", "uffd")
    assert not kernel.waits
    assert thread.waits
    assert thread.fault_ns > kernel.fault_ns >= 0


def test_a_figure_is_kept_for_a_minute(monkeypatch) -> None:
    first = rearmcost.rearm_cost("pagemap", "emulated")
    assert first.fault_ns > 0
    assert rearmcost.rearm_cost("pagemap", "emulated").fault_ns == first.fault_ns
    monkeypatch.setattr(rearmcost, "MAX_AGE_S", 0.0)
    made = []
    monkeypatch.setattr(
        rearmcost, "_measure", lambda *a: made.append(a) or rearmcost._Measured(7.0, False, 0.0)
    )
    assert rearmcost.rearm_cost("pagemap", "emulated").fault_ns == 7.0
    assert made == [("pagemap", "emulated")]


def test_there_is_no_cost_without_a_tracker() -> None:
    with hot_machine("emulated") as machine, pytest.raises(StateError, match="harvest first"):
        machine.rearm_cost()
