"""Changing the tracker of a VM: a refusal leaves the one in use, with what it has seen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.guests import image_path
from kvmhost.guests.workloads import touch_gfns
from kvmhost.machine import Machine
from kvmhost.trackers import registry

pytestmark = [pytest.mark.requires_kvm, pytest.mark.requires_uffd]

START, PAGES = 1029, 2043
TRACKERS = ("guestpt", "pagemap", "dirty", "uffd")


def touch_machine() -> Machine:
    params = {"gfn_start": START, "pages": PAGES, "epochs": 0, "stride": 3, "write": 1}
    machine = Machine(image_path("touch"), mem_bytes=48 << 20, engine="kvm", params=params)
    machine.step_by_doorbell()
    return machine


def expect_epoch(machine: Machine, epoch: int, **how: str) -> None:
    """The next harvest reports what one epoch touched, and nothing beside it."""
    young = machine.harvest(START, PAGES, **how).young
    assert young.gfns().tolist() == touch_gfns(machine.params, epoch).tolist()
    assert young.coarse is None


@pytest.mark.parametrize(("before", "refused"), [*itertools.permutations(TRACKERS, 2)])
def test_who_cannot_start_stops_nobody(
    before: str, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise CapabilityError("tracker", "what it needs", "nothing", "use another")

    with touch_machine() as machine:
        machine.harvest(0, machine.memory.gfn_end, tracker=before)
        assert machine.run_epoch()
        kind = type(registry.create(refused, machine.tracked_vm()))
        with monkeypatch.context() as patched:
            patched.setattr(kind, "start", fail)
            with pytest.raises(CapabilityError):
                machine.harvest(START, PAGES, tracker=refused)
        assert machine.tracker_name == before
        expect_epoch(machine, 0)
        # Exactness too: fault-around is still off, the log still on.
        assert machine.run_epoch()
        expect_epoch(machine, 1)


@pytest.mark.parametrize("before", TRACKERS)
@pytest.mark.parametrize("after", TRACKERS)
def test_every_change_of_trackers_begins_an_exact_window(before: str, after: str) -> None:
    with touch_machine() as machine:
        machine.harvest(0, machine.memory.gfn_end, tracker=before)
        assert machine.run_epoch()
        machine.use_tracker(after)
        if after != before:
            assert machine.harvest(START, PAGES, clear=False).young.count() == 0
        for epoch in (1, 2):
            machine.harvest(START, PAGES)
            assert machine.run_epoch()
            expect_epoch(machine, epoch, tracker=after)


def test_the_userfaultfd_is_taken_and_the_tracker_in_use_goes_on() -> None:
    with touch_machine() as machine:
        machine.harvest(0, machine.memory.gfn_end, tracker="pagemap")
        machine.open_userfault().claim("pager")
        assert machine.run_epoch()
        with pytest.raises(CapabilityError, match="pager reads them"):
            machine.harvest(START, PAGES, tracker="uffd")
        assert machine.tracker_name == "pagemap"
        expect_epoch(machine, 0)


@pytest.mark.parametrize(
    ("gfn_start", "n_pages", "how"),
    [
        (0, 1 << 40, {}),
        (START, PAGES, {"mask": np.zeros(1, dtype=np.uint64)}),
        (START, PAGES, {"rearm": "sample", "fraction": 2.0}),
        (START, PAGES, {"rearm": "often"}),
        (-1, 64, {}),
        (1 << 51, 0, {}),
    ],
)
def test_a_bad_argument_changes_no_tracker_and_clears_no_bit(
    gfn_start: int, n_pages: int, how: dict[str, object]
) -> None:
    with touch_machine() as machine:
        machine.harvest(0, machine.memory.gfn_end, tracker="guestpt")
        assert machine.run_epoch()
        with pytest.raises(LayoutError):
            machine.harvest(gfn_start, n_pages, tracker="pagemap", **how)
        assert machine.tracker_name == "guestpt"
        expect_epoch(machine, 0)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_refuses_what_lies_beyond_memory_before_it_allocates(name: str) -> None:
    with touch_machine() as machine:
        used = machine.use_tracker(name)
        for call in (used.harvest, used.rearm):
            with pytest.raises(LayoutError, match="memory ends at gfn"):
                call(0, 1 << 40)
