"""Views on real guests: each reader gets what the guest touched in its own window.

The truth is computed from the guests' parameters (guests/workloads.py), epoch by epoch.
"""

from __future__ import annotations

import functools
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from waiting import until

from kvmhost.errors import CapabilityError, InUseError
from kvmhost.machine import Machine
from kvmhost.machine.restore import restore_machine
from kvmhost.machine.snapshot import save_machine
from kvmhost.tools.accuracy.kinds import (
    FREE_WORKLOADS,
    GFN_START,
    KINDS,
    PAGES,
    WORKLOADS,
    AccuracyWorkload,
    probe_kinds,
)
from kvmhost.trackers import registry

pytestmark = pytest.mark.requires_uffd

ENGINES = [pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]
on_kvm = pytest.mark.requires_kvm
TRACKERS = ("guestpt", "pagemap", "dirty", "uffd")


@functools.cache
def supports(engine: str):
    return probe_kinds(engine)


def need(kind: str, engine: str) -> None:
    support = supports(engine)[kind]
    if not support.works:
        pytest.skip(f"{kind} on {engine}: {support.reason}")


class Readers:
    """Views of one stepping machine, and the pages that each should get."""

    def __init__(self, machine: Machine, workload: AccuracyWorkload, kind) -> None:
        self.machine, self._workload, self._kind = machine, workload, kind
        self._epoch = -1
        self._expected: dict[str, np.ndarray] = {}

    def join(self, name: str) -> None:
        assert not self.machine.harvest(view=name, tracker=self._kind.tracker).young
        self._expected[name] = np.zeros(PAGES, dtype=bool)

    def leave(self, name: str) -> None:
        assert self.machine.close_view(name)
        del self._expected[name]

    def run_epoch(self) -> None:
        assert self.machine.run_epoch()
        self._epoch += 1
        touched = self._workload.touched(self.machine.params, self._epoch, self._kind.only_writes)
        for expected in self._expected.values():
            expected |= touched

    def check(self, name: str, **how) -> None:
        young = self.machine.harvest(GFN_START, PAGES, view=name, **how).young
        assert young.coarse is None
        assert np.array_equal(young.as_bool(), self._expected[name]), name
        if how.get("clear", True):
            self._expected[name] = np.zeros(PAGES, dtype=bool)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workload", ["random-writes", "phases-2-vcpus"])
def test_three_readers_at_different_intervals(engine: str, kind: str, workload: str) -> None:
    need(kind, engine)
    chosen, chance = WORKLOADS[workload], random.Random(f"{kind}/{workload}")
    with chosen.machine(KINDS[kind], engine) as machine:
        machine.step_by_doorbell()
        readers = Readers(machine, chosen, KINDS[kind])
        intervals = {"every": 1, "second": 2, "seldom": 5}
        for name in intervals:
            readers.join(name)
        for epoch in range(1, 16):
            readers.run_epoch()
            due = [name for name, every in intervals.items() if epoch % every == 0]
            chance.shuffle(due)
            for name in due:
                if chance.random() < 0.3:
                    readers.check(name, clear=False)
                readers.check(name)
            if chance.random() < 0.3:
                leaver = chance.choice(list(intervals))
                readers.leave(leaver)
                readers.join(leaver)


@pytest.fixture
def pair() -> Iterator[Callable[..., Readers]]:
    """Make readers of a machine that writes random pages, at a doorbell."""
    machines = []

    def make(kind: str = "guestpt") -> Readers:
        need(kind, "kvm")
        workload = WORKLOADS["random-writes"]
        machine = workload.machine(KINDS[kind], "kvm")
        machines.append(machine)
        machine.step_by_doorbell()
        readers = Readers(machine, workload, KINDS[kind])
        readers.join("a")
        return readers

    yield make
    for machine in machines:
        machine.close()


# -- what another reader does between two harvests of a reader -------------------------


@on_kvm
@pytest.mark.parametrize("kind", TRACKERS)
def test_who_joins_or_leaves_disturbs_nobody(pair, kind: str) -> None:
    readers = pair(kind)
    readers.run_epoch()
    readers.join("b")
    readers.run_epoch()
    readers.check("b")
    readers.run_epoch()
    readers.leave("b")
    readers.check("a")
    readers.run_epoch()
    readers.check("a")


@on_kvm
@pytest.mark.parametrize("kind", TRACKERS)
@pytest.mark.parametrize(
    "other",
    [
        {"rearm": "none"},
        {"rearm": "all"},
        {"rearm": "sample", "fraction": 0.25},
        {"clear": False},
        {"table_format": "stage2"},
        {"gfn_start": GFN_START + 3, "n_pages": 777},
        {"mask": np.full(PAGES // 64, 0x5555555555555555, dtype=np.uint64),
         "gfn_start": GFN_START, "n_pages": PAGES},
    ],
    ids=lambda other: "-".join(other),
)  # fmt: skip
def test_how_one_reader_harvests_disturbs_nobody(pair, kind: str, other) -> None:
    readers = pair(kind)
    readers.join("b")
    for epoch in range(6):
        readers.run_epoch()
        readers.machine.harvest(view="b", **other)
        if epoch % 2:
            readers.check("a")


@on_kvm
@pytest.mark.parametrize("kind", ["guestpt", "pagemap", "dirty"])
def test_evicted_pages_stay_young_for_who_did_not_ask_yet(pair, kind: str) -> None:
    readers = pair(kind)
    readers.run_epoch()
    readers.machine.harvest()
    evicted = readers.machine.open_pager().evict(
        np.arange(GFN_START, GFN_START + PAGES, dtype=np.int64)
    )
    assert (evicted.outcomes == 0).any()
    readers.check("a")
    readers.run_epoch()
    readers.check("a")


@on_kvm
def test_dropped_pages_stay_young_for_who_did_not_ask_yet(pair) -> None:
    readers = pair("guestpt")
    readers.run_epoch()
    readers.machine.harvest()
    assert readers.machine.drop(GFN_START, PAGES)
    readers.check("a")


@on_kvm
def test_a_snapshot_leaves_the_views_alone_and_takes_none_along(pair, tmp_path: Path) -> None:
    readers = pair("guestpt")
    readers.join("b")
    readers.run_epoch()
    readers.check("b")
    save_machine(readers.machine, tmp_path / "vm.snap")
    with restore_machine(tmp_path / "vm.snap") as restored:
        assert restored.views() == []
        assert not restored.harvest(view="a", tracker="guestpt").young
        assert [view.key.name for view in restored.views()] == ["default", "a"]
    readers.check("a")
    readers.run_epoch()
    readers.check("b")


# -- another tracker -----------------------------------------------------------------


@on_kvm
@pytest.mark.parametrize(("before", "after"), [*itertools.permutations(TRACKERS, 2)])
def test_a_forced_tracker_keeps_the_views_and_is_put_back(pair, before: str, after: str) -> None:
    readers = pair(before)
    machine = readers.machine
    readers.run_epoch()
    with pytest.raises(InUseError, match=rf"{before} is in use by a \(process \d+\)"):
        machine.harvest(view="b", tracker=after)
    assert machine.tracker_name == before
    machine.harvest(view="b", tracker=after, force=True)
    readers.run_epoch()
    young = machine.harvest(GFN_START, PAGES, view="a", clear=False).young
    assert young.provenance.tracker == "mixed"
    # It asks for the tracker that it knows, and goes on with the one that was forced on it.
    readers.check("a", tracker=before)
    assert machine.tracker_name == after
    readers.run_epoch()
    assert machine.close_view("b")
    assert machine.tracker_name == before
    readers.run_epoch()
    readers.check("a", tracker=before)


@on_kvm
def test_changes_forced_by_two_readers_are_undone_in_any_order(pair) -> None:
    for first, second in (("b", "c"), ("c", "b")):
        machine = pair("guestpt").machine
        machine.harvest(view="b", tracker="pagemap", force=True)
        machine.harvest(view="c", tracker="dirty", force=True)
        machine.close_view(first)
        assert machine.tracker_name == ("dirty" if first == "b" else "pagemap")
        machine.close_view(second)
        assert machine.tracker_name == "guestpt"


@on_kvm
def test_who_forced_a_tracker_may_take_it_back(pair) -> None:
    machine = pair("guestpt").machine
    machine.harvest(view="b", tracker="pagemap", force=True)
    machine.harvest(view="b", tracker="guestpt")
    machine.harvest(view="c", tracker="dirty", force=True)
    machine.close_view("b")
    assert machine.tracker_name == "dirty"


@on_kvm
def test_a_lone_reader_changes_the_tracker_for_good(pair) -> None:
    machine = pair("guestpt").machine
    machine.harvest(view="a", tracker="pagemap")
    machine.close_view("a")
    assert machine.tracker_name == "pagemap"
    machine.harvest(tracker="dirty")
    with pytest.raises(InUseError, match="in use by the unnamed view"):
        machine.harvest(view="a", tracker="pagemap")


@on_kvm
def test_a_machine_that_is_read_keeps_its_tracker(pair) -> None:
    machine = pair("guestpt").machine
    with pytest.raises(InUseError, match="in use by a "):
        machine.use_tracker("pagemap")
    assert machine.use_tracker("pagemap", force=True).name == "pagemap"


@on_kvm
def test_a_tracker_that_cannot_be_put_back_leaves_the_one_in_use(pair, monkeypatch, caplog) -> None:
    readers = pair("pagemap")
    machine = readers.machine
    machine.harvest(view="b", tracker="guestpt", force=True)
    kind = type(registry.create("pagemap", machine.tracked_vm()))

    def fail(self: object) -> None:
        raise CapabilityError("tracker", "what it needs", "nothing", "use another")

    monkeypatch.setattr(kind, "start", fail)
    readers.run_epoch()
    assert machine.close_view("b")
    assert machine.tracker_name == "guestpt"
    assert "tracker pagemap is not back in use" in caplog.text
    readers.check("a")


# -- guests that run -------------------------------------------------------------------


@on_kvm
@pytest.mark.parametrize("kind", ["guestpt", "pagemap", "dirty"])
def test_a_running_guest_is_seen_within_the_bounds_of_one_reader(kind: str) -> None:
    """As in tools/accuracy/running.py, with two other readers that harvest all the time."""
    need(kind, "kvm")
    workload, ended = FREE_WORKLOADS["random-writes"], threading.Event()
    with workload.machine(KINDS[kind], "kvm") as machine:
        machine.step_by_doorbell()
        machine.harvest(view="slow", tracker=KINDS[kind].tracker)

        def harvest_often(name: str) -> None:
            while not ended.wait(0.001):
                machine.harvest(view=name)

        others = [threading.Thread(target=harvest_often, args=(name,)) for name in ("b", "c")]
        machine.run_epoch()
        began = armed = machine.vcpus[0].epoch
        machine.harvest(view="slow")
        machine.step_by_doorbell(False)
        for thread in others:
            thread.start()
        windows = []
        try:
            for _ in range(8):
                until(lambda at=armed: machine.vcpus[0].epoch >= at + 6, "six epochs")
                before = machine.vcpus[0].epoch
                young = machine.harvest(GFN_START, PAGES, view="slow").young
                after = machine.vcpus[0].epoch
                windows.append((young.as_bool(), began, armed, before, after))
                began, armed = before, machine.vcpus[0].epoch
        finally:
            ended.set()
            for thread in others:
                thread.join()
        params = machine.params
    for young, began, armed, before, after in windows:
        certain = epochs(workload, params, kind, armed + 2, before + 1)
        possible = epochs(workload, params, kind, began + 1, after + 2)
        assert not (certain & ~young).any()
        assert not (young & ~possible).any()
        assert certain.any()


def epochs(workload: AccuracyWorkload, params, kind: str, first: int, end: int) -> np.ndarray:
    bits = np.zeros(PAGES, dtype=bool)
    for epoch in range(first, end):
        bits |= workload.touched(params, epoch, KINDS[kind].only_writes)
    return bits
