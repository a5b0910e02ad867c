"""Memslots that change under running vCPUs: aliases, moves, deletions, protection."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from waiting import DEADLINE_S, until

from kvmhost.errors import CapabilityError, InUseError, LayoutError, StateError, UnexpectedExit
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.machine.aliased import AliasedMachine
from kvmhost.memory.layout import HIGH_GPA, PARAMS_GPA

pytestmark = pytest.mark.usefixtures("nothing_left")

KVM = pytest.param("kvm", marks=pytest.mark.requires_kvm)
ENGINES = [KVM, "emulated"]
PIECE = 2 << 20
PAGES = PIECE >> 12
HIGH_GFN = HIGH_GPA >> 12
Make = Callable[..., AliasedMachine]


@pytest.fixture
def make() -> Iterator[Make]:
    """Return a maker of machines over four memslots of 2 MiB, with the guest ``touch``."""
    made: list[AliasedMachine] = []

    def make_one(engine: str, slots: int = 4, **params: int) -> AliasedMachine:
        params = {"gfn_start": HIGH_GFN, "pages": 64, "write": 1, "epochs": 0} | params
        sizes = {"span_bytes": slots * PIECE, "piece_bytes": PIECE}
        machine = AliasedMachine(image_path("touch"), engine=engine, params=params, **sizes)  # type: ignore[arg-type]
        made.append(machine)
        return machine

    yield make_one
    for machine in made:
        machine.close()


def slot_gpa(number: int) -> int:
    """Return the gpa of memslot 1 + number of the span."""
    return HIGH_GPA + number * PIECE


def touch_at(machine: Machine, gpa: int) -> None:
    """Have the guest touch another range from its next epoch on."""
    machine.memory[PARAMS_GPA + 0x40 : PARAMS_GPA + 0x48] = (gpa >> 12).to_bytes(8, "little")


def word(machine: Machine, gpa: int) -> int:
    return int.from_bytes(machine.memory[gpa : gpa + 8], "little")


def epochs_pass(machine: Machine) -> None:
    before = machine.doorbells
    until(lambda: machine.doorbells > before + 1 or machine.error is not None, "epochs pass")
    assert machine.error is None


@pytest.mark.parametrize("engine", ENGINES)
def test_all_aliases_show_the_same_memory(make: Make, engine: str) -> None:
    machine = make(engine)
    machine.step_by_doorbell()
    assert [slot.gpa for slot in machine.memslots.list()] == [0, *map(slot_gpa, range(4))]
    for number in (0, 3, 1):
        touch_at(machine, slot_gpa(number))
        assert machine.run_epoch(DEADLINE_S)
        # The guest stores the gfn through which it writes.
        assert word(machine, HIGH_GPA + 4096) == (slot_gpa(number) >> 12) + 1
    assert machine.memory.find_hva(slot_gpa(2) + 5) == machine.piece.guest_address + 5
    assert machine.memory.find_hva(slot_gpa(4)) is None


@pytest.mark.parametrize("engine", ENGINES)
def test_slots_come_and_go_under_a_running_guest(make: Make, engine: str) -> None:
    machine = make(engine)
    machine.start()
    second = 2
    for _ in range(5):
        machine.memslots.delete(second)
        epochs_pass(machine)
        machine.memslots.move(3, slot_gpa(1))
        epochs_pass(machine)
        machine.memslots.move(3, slot_gpa(2))
        second = machine.memslots.add_alias(slot_gpa(1), PIECE, HIGH_GPA).number
        epochs_pass(machine)
    touch_at(machine, slot_gpa(3))
    epochs_pass(machine)
    machine.memslots.delete(4)
    with pytest.raises(UnexpectedExit) as raised:
        machine.wait(DEADLINE_S)
    # The guest was at any page of the slot when it went.
    found = re.search("write outside all memory slots, gpa (0x[0-9a-f]+):", str(raised.value))
    assert found, raised.value
    assert slot_gpa(3) <= int(found[1], 16) < slot_gpa(3) + PIECE


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("access", ["read", "none"])
def test_protection_holds_through_every_alias(make: Make, engine: str, access: Any) -> None:
    machine = make(engine)
    machine.waits_in_memory_faults = True
    touch_at(machine, slot_gpa(2))
    machine.start()
    epochs_pass(machine)
    machine.memslots.protect(HIGH_GPA + 8 * 4096, 4096, access)
    assert machine.wait_for_memory_faults(DEADLINE_S)
    fault = machine.memory_faults[0]
    assert fault.gpa == slot_gpa(2) + 8 * 4096
    assert fault.hva == machine.piece.guest_address + 8 * 4096
    assert fault.is_write is True
    assert fault.rip == machine.vcpus[0].registers()["rip"]
    assert machine.vcpus[0].faults == 1
    machine.memslots.protect(HIGH_GPA, PIECE, "write")
    machine.retry_memory_faults()
    epochs_pass(machine)
    assert not machine.memory_faults


@pytest.mark.parametrize("engine", ENGINES)
def test_unmapped_memory_comes_back_with_its_contents(make: Make, engine: str) -> None:
    machine = make(engine)
    machine.waits_in_memory_faults = True
    touch_at(machine, slot_gpa(1))
    machine.start()
    epochs_pass(machine)
    machine.memslots.unmap(HIGH_GPA + 4096, 4096)
    assert machine.wait_for_memory_faults(DEADLINE_S)
    assert machine.memory_faults[0].gpa == slot_gpa(1) + 4096
    assert word(machine, HIGH_GPA + 4096) == (slot_gpa(1) >> 12) + 1
    machine.memslots.remap(HIGH_GPA + 4096, 4096)
    machine.retry_memory_faults()
    epochs_pass(machine)


TRACKED = [
    pytest.param("kvm", "pagemap", marks=pytest.mark.requires_kvm),
    pytest.param("kvm", "guestpt", marks=pytest.mark.requires_kvm),
    pytest.param("kvm", "dirty", marks=pytest.mark.requires_kvm),
    pytest.param("emulated", "guestpt"),
]


def young_gfns(machine: Machine, tracker: str, view: str = "default") -> set[int]:
    """Return the young gfns from 4 GiB on."""
    found = machine.harvest(HIGH_GFN, tracker=tracker, view=view).young.gfns()
    return {int(gfn) for gfn in found}


def seen_at(number: int, tracker: str) -> set[int]:
    """Return what a tracker sees of touches of 64 pages: guestpt the whole leaf of 2 MiB."""
    return range_at(number, PAGES if tracker == "guestpt" else 64)


def range_at(number: int, count: int = 64) -> set[int]:
    first = slot_gpa(number) >> 12
    return set(range(first, first + count))


@pytest.mark.requires_uffd
@pytest.mark.parametrize(("engine", "tracker"), TRACKED)
def test_views_and_evictions_follow_a_move(make: Make, engine: str, tracker: str) -> None:
    machine = make(engine)
    for number in (2, 3, 4):
        machine.memslots.delete(number)
    machine.step_by_doorbell()
    assert machine.run_epoch(DEADLINE_S)
    young_gfns(machine, tracker)
    young_gfns(machine, tracker, "other")  # opens the view
    assert machine.run_epoch(DEADLINE_S)
    assert young_gfns(machine, tracker) == seen_at(0, tracker)
    assert machine.evict(sorted(range_at(0))).done == 64
    assert machine.memslots.move(1, slot_gpa(2)).gpa == slot_gpa(2)

    # Eviction: the same pages, by their new gfns; nothing goes by the old ones.
    assert machine.page(slot_gpa(2) >> 12).state == "evicted"
    with pytest.raises(LayoutError, match="in no memory region"):
        machine.page(HIGH_GFN)
    assert word(machine, slot_gpa(2) + 4096) == HIGH_GFN + 1, "the contents came along"
    # Views: what one had not asked for yet is young at the new place.
    assert young_gfns(machine, tracker, "other") == seen_at(2, tracker)
    young_gfns(machine, tracker)
    # The tracker: touches at the new place count there.
    touch_at(machine, slot_gpa(2))
    assert machine.run_epoch(DEADLINE_S)
    assert young_gfns(machine, tracker) == seen_at(2, tracker)
    machine.memslots.move(1, HIGH_GPA)
    touch_at(machine, HIGH_GPA)
    assert machine.run_epoch(DEADLINE_S)
    found = young_gfns(machine, tracker)
    assert seen_at(0, tracker) <= found <= seen_at(0, tracker) | seen_at(2, tracker)


@pytest.mark.parametrize(("engine", "tracker"), TRACKED)
def test_a_deleted_slot_is_in_no_view_and_keeps_its_data(
    make: Make, engine: str, tracker: str
) -> None:
    machine = make(engine, slots=1)
    machine.step_by_doorbell()
    young_gfns(machine, tracker)
    assert machine.run_epoch(DEADLINE_S)
    machine.memslots.delete(1)
    assert young_gfns(machine, tracker) == set()
    assert [slot.number for slot in machine.memslots.list()] == [0]
    assert [slot.slot for slot in machine.memory_map().memslots] == [0]
    assert word(machine, HIGH_GPA + 4096) == HIGH_GFN + 1
    machine.memslots.restore(1)
    assert machine.run_epoch(DEADLINE_S)
    assert young_gfns(machine, tracker) == seen_at(0, tracker)


@pytest.mark.requires_kvm
def test_accesses_through_aliases_count_at_the_region(make: Make) -> None:
    machine = make("kvm")
    machine.step_by_doorbell()
    assert machine.use_tracker("auto").name == "pagemap", "guestpt sees no access through an alias"
    for number in range(4):
        touch_at(machine, slot_gpa(number) + number * 64 * 4096)
        assert machine.run_epoch(DEADLINE_S)
    assert young_gfns(machine, "pagemap") == range_at(0, 256)
    for tracker in ("guestpt", "dirty"):
        with pytest.raises(CapabilityError, match="aliased memslots"):
            machine.harvest(tracker=tracker)


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_eviction_through_aliases_keeps_the_data(make: Make) -> None:
    machine = make("kvm")
    touch_at(machine, slot_gpa(1))
    machine.start()
    for _ in range(10):
        machine.evict(sorted(range_at(0)))
        epochs_pass(machine)
    machine.pause()
    found = machine.memory.array(HIGH_GPA, (64, 512), "<u8")[:, 0]
    np.testing.assert_array_equal(found, (slot_gpa(1) >> 12) + np.arange(64))
    with pytest.raises(LayoutError, match=f"is an alias of gfn {HIGH_GFN:#x}"):
        machine.page(slot_gpa(1) >> 12)
    with pytest.raises(StateError, match="served by the pager"):
        machine.memslots.unmap(HIGH_GPA, PIECE)


def test_bad_changes_are_refused_and_change_nothing(make: Make) -> None:
    machine = make("emulated")
    before = machine.memslots.list()
    slots = machine.memslots
    for bad, match in [
        (lambda: slots.add_alias(HIGH_GPA, PIECE, HIGH_GPA), "overlaps memslot 1"),
        (lambda: slots.add_alias(1 << 40, 1, HIGH_GPA), "whole pages"),
        (lambda: slots.add_alias(1 << 40, 2 * PIECE, HIGH_GPA), "is not in"),
        (lambda: slots.move(2, slot_gpa(2)), "overlaps memslot 3"),
        (lambda: slots.move(0, 1 << 40), "pinned pages"),
        (lambda: slots.move(9, 1 << 40), "no memslot 9"),
        (lambda: slots.move(2, 5), "not at a page"),
        (lambda: slots.delete(0), "pinned pages"),
        (lambda: slots.restore(1), "was not deleted"),
        (lambda: slots.protect(HIGH_GPA, 100, "read"), "not whole pages"),
        (lambda: slots.protect(1 << 45, 4096, "read"), "is not in"),
    ]:
        with pytest.raises(LayoutError, match=match):
            bad()
    assert slots.list() == before
    with pytest.raises(CapabilityError, match="aliased memory"):
        machine.snapshot("/nonexistent")


def test_no_alias_beside_a_tracker_that_cannot_see_it(make_vm: Callable[..., Machine]) -> None:
    machine = make_vm(image_path("touch"), mem_bytes=4 << 20, engine="emulated")
    machine.use_tracker("guestpt")
    with pytest.raises(InUseError, match="guestpt is in use"):
        machine.memslots.add_alias(1 << 32, 4096, 0x10_0000)
    assert not machine.memslots.changed


@pytest.mark.requires_kvm
def test_no_snapshot_with_changed_memslots(make_vm: Callable[..., Machine], tmp_path: Any) -> None:
    machine = make_vm(image_path("touch"), mem_bytes=4 << 20, engine="kvm")
    slot = machine.memslots.add_alias(1 << 32, 4096, 0x10_0000)
    with pytest.raises(StateError, match="other memslots"):
        machine.snapshot(tmp_path / "file")
    machine.memslots.delete(slot.number)
    assert machine.snapshot(tmp_path / "file") > 0
