"""The daemon against VMs of plain Python: what it asks, and when it ends."""

from __future__ import annotations

import threading
import types

import numpy as np
import pytest

from kvmhost.bitmap import YoungBitmap, unpack
from kvmhost.control import schema
from kvmhost.errors import ControlError, VmGoneError
from reclaim import daemon as daemon_module
from reclaim.daemon import Daemon, Dropped, PassReport, Settings, VmReclaimer
from reclaim.policy.lru_gen import LruGen
from reclaim.pressure.budget import Budget

N = 1000
BUDGET = Budget(500 * 4096, 450 * 4096, 400 * 4096)


class FakeVm:
    """A guest of N pages, the first ten pinned; touches what ``touches`` says each window."""

    def __init__(self, name="fake"):
        self.vm = name
        self.here = np.ones(N, bool)
        self.touches = lambda window: range(100)
        self.window = 0
        self.asked, self.victims, self.limit = [], None, None
        self.full_after, self.shrunk = N, 0
        self.trouble = {}

    def _meet(self, what):
        problem = self.trouble.get(what)
        if problem:
            raise problem

    def memory(self):
        self._meet("memory")
        regions = [schema.RegionInfo(0, 0, N * 4096, 0, N, 0)]
        return schema.MemoryMap(4096, N, regions, [schema.PageRange(0, 10)])

    def set_limit(self, n_bytes):
        self._meet("limit")
        self.limit = n_bytes

    def shrink(self, n_bytes):
        self.shrunk += 1
        went = np.flatnonzero(self.here)[n_bytes // 4096 :]
        self.here[went] = False
        return len(went)

    def harvest_timed(
        self, gfn_start, n_pages, *, tracker, clear=True, rearm="young", fraction=None
    ):
        self._meet("harvest")
        self.asked.append((gfn_start, n_pages, tracker, clear, rearm))
        young = list(self.touches(self.window))
        self.window += 1
        self.here[young] = True
        return YoungBitmap.from_gfns(0, N, young), schema.HarvestCost(3000, 2000)

    def resident(self, gfn_start, n_pages):
        return self.here.copy()

    def evict(self, gfns, each=False):
        self._meet("evict")
        outcomes = np.zeros(len(gfns), np.uint8)
        outcomes[self.full_after :] = 3
        self.here[gfns[outcomes == 0]] = False
        counts = {"done": int((outcomes == 0).sum()), "full": int((outcomes == 3).sum())}
        return schema.EvictReport(len(gfns), counts, outcomes.tobytes())

    def set_victims(self, gfns):
        self.victims = gfns

    def state(self):
        self._meet("state")
        return types.SimpleNamespace(running=True)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


@pytest.fixture
def vm():
    return FakeVm()


def reclaimer(vm, policy=None, **settings):
    return VmReclaimer(vm, Settings(BUDGET, **settings), policy)


def test_the_limit_is_set_before_the_first_pass(vm):
    reclaimer(vm)
    assert vm.limit == 500 * 4096
    assert vm.asked == []


def test_passes_age_and_evict_the_oldest_down_to_the_low_mark(vm):
    mine = reclaimer(vm, tracker="pagemap")
    first = mine.run_pass()
    assert vm.asked == [(0, N, "pagemap", True, "young")]
    assert (first.wanted_pages, first.evicted_pages, first.young_pages) == (600, 0, 100)
    # Seen once is not in the youngest generation yet.
    assert first.generations == [(0, 990), (1, 0)]
    assert first.harvest_ns_per_page == 5
    second = mine.run_pass()
    assert second.evicted_pages == 600
    assert second.resident_bytes == 400 * 4096
    # The oldest went in order of gfn; the hot hundred, and pinned pages, stayed.
    assert np.flatnonzero(vm.here).tolist() == [*range(100), *range(700, 1000)]
    assert vm.victims.tolist() == list(range(700, 1000))
    third = mine.run_pass()
    assert (third.wanted_pages, third.outcomes) == (0, {})
    assert third.number == 3


class Miser(LruGen):
    """Spares every page while all of them are young."""

    def age(self, young, now_ns):
        self.all_young = int(unpack(young, self.n_pages).sum()) == N
        super().age(young, now_ns)

    def victims(self, n, candidates, now_ns, probe=None):
        return super().victims(0 if self.all_young else n, candidates, now_ns)


def test_a_vm_that_is_young_everywhere_is_shrunk_by_its_own_choice(vm):
    vm.touches = lambda window: range(N) if window < 6 else range(100)
    mine = reclaimer(vm, policy=Miser(N))
    assert [mine.run_pass().forced_pages for _ in range(3)] == [0, 0, 0]
    fourth = mine.run_pass()
    assert (fourth.wanted_pages, fourth.evicted_pages, fourth.forced_pages) == (600, 0, 500)
    assert ", forced 500," in fourth.line()
    vm.touches = lambda window: range(100)
    shrunk = vm.shrunk
    assert [mine.run_pass().forced_pages for _ in range(3)] == [0, 0, 0]
    assert vm.shrunk == shrunk


def test_pages_that_come_back_are_counted_and_protected(vm):
    mine = reclaimer(vm)
    for _ in range(2):
        mine.run_pass()
    vm.here[100:150] = True
    report = mine.run_pass()
    assert report.refaulted_pages == 50
    # They are the last to go of what may go.
    assert set(vm.victims[-50:].tolist()) == set(range(100, 150))
    assert mine.run_pass().refaulted_pages == 0


def test_what_the_fault_handler_evicted_counts_as_evicted(vm):
    mine = reclaimer(vm)
    mine.run_pass()
    vm.here[500:600] = False
    mine.run_pass()
    vm.here[550:600] = True
    assert mine.run_pass().refaulted_pages == 50


def test_victims_are_bounded(vm):
    mine = reclaimer(vm, max_victims=7)
    for _ in range(2):
        mine.run_pass()
    assert vm.victims.tolist() == list(range(700, 707))


def test_a_full_store_ends_the_eviction_of_a_pass(vm, monkeypatch):
    monkeypatch.setattr(daemon_module, "_BATCH_PAGES", 100)
    vm.full_after = 30
    mine = reclaimer(vm)
    mine.run_pass()
    report = mine.run_pass()
    assert report.outcomes == {"done": 30, "full": 70}
    assert report.resident_bytes == 970 * 4096


def test_a_stop_ends_the_eviction_between_batches(vm, monkeypatch):
    monkeypatch.setattr(daemon_module, "_BATCH_PAGES", 100)
    mine = reclaimer(vm)
    mine.run_pass()
    stop = threading.Event()
    stop.set()
    assert mine.run_pass(stop).evicted_pages == 0


def test_the_line_has_everything(vm):
    mine = reclaimer(vm)
    mine.run_pass()
    line = mine.run_pass().line()
    assert line.startswith("fake pass 2: resident 1.6 MiB, young 100, generations 0:300 1:0 2:90,")
    assert "evicted 600 of 600, refaulted 0, harvest 5.0 ns/page, " in line


# -- the loop -----------------------------------------------------------------


@pytest.fixture
def vms(monkeypatch):
    found = {}

    def connect(name):
        return found.setdefault(name, FakeVm(name))

    monkeypatch.setattr(daemon_module, "Client", connect)
    return found


class Events(list):
    """Collects reports; calls a function after each."""

    def __init__(self, then=lambda event: None):
        super().__init__()
        self._then = then

    def __call__(self, event):
        self.append(event)
        self._then(event)

    def of(self, kind):
        return [event for event in self if isinstance(event, kind)]


FAST = Settings(BUDGET, interval_s=0.001)


def test_passes_end_the_daemon(vms):
    events = Events()
    assert Daemon(["a", "b", "a"], FAST, events, passes=3).run()
    assert sorted((e.vm, e.number) for e in events) == [
        (vm, number) for vm in "ab" for number in (1, 2, 3)
    ]


def test_stop_ends_the_daemon(vms):
    events = Events(lambda event: daemon.stop())
    daemon = Daemon(["a"], Settings(BUDGET, interval_s=1000), events)
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
    daemon = Daemon(["a", "b"], FAST, events)
    assert daemon.run()
    assert events.of(Dropped) == [Dropped("a", "hung up", failed=False)]


def test_a_guest_that_ended_is_dropped(vms):
    vms["a"] = FakeVm("a")
    vms["a"].state = lambda: types.SimpleNamespace(running=False)
    events = Events()
    assert Daemon(["a"], FAST, events).run()
    assert events[-1] == Dropped("a", "the guest has ended", failed=False)


def test_a_vm_that_is_not_there_fails_without_wait(vms):
    vms["a"] = FakeVm("a")
    vms["a"].trouble["memory"] = VmGoneError("a", "nothing answers")
    events = Events()
    assert not Daemon(["a"], FAST, events).run()
    assert events == [Dropped("a", "nothing answers", failed=True)]


def test_wait_waits_until_it_is_there(vms, monkeypatch):
    monkeypatch.setattr(daemon_module, "_LOOK_S", 0.001)
    vms["a"] = vm = FakeVm("a")
    vm.trouble["memory"] = VmGoneError("a", "nothing answers")
    looked = []

    def memory():
        looked.append(1)
        if len(looked) == 3:
            vm.trouble.clear()
        return FakeVm.memory(vm)

    vm.memory = memory
    assert Daemon(["a"], FAST, Events(), passes=1, wait=True).run()
    assert len(looked) == 3


def test_a_vm_without_a_pager_fails_at_once(vms):
    vms["a"] = FakeVm("a")
    vms["a"].trouble["limit"] = ControlError(501, "userfaultfd: run as root")
    events = Events()
    assert not Daemon(["a"], FAST, events).run()
    assert [e.failed for e in events] == [True]
    assert "run as root" in events[0].reason


def test_refusals_are_retried_and_then_given_up(vms):
    vms["a"] = vm = FakeVm("a")
    vm.trouble["evict"] = ControlError(409, "busy")
    events = Events()
    assert not Daemon(["a"], FAST, events).run()
    assert [e.number for e in events.of(PassReport)] == [1]
    assert events[-1] == Dropped("a", "busy (HTTP 409)", failed=True)
    assert vm.window == 1 + 5
