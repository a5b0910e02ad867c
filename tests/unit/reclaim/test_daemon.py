"""The daemon against VMs of plain Python: what it asks, and when it ends."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
import types
import weakref

import numpy as np
import pytest

from kvmhost.bitmap import YoungBitmap, unpack
from kvmhost.control import schema
from kvmhost.errors import ControlError, VmGoneError
from kvmhost.reclaim.account.events import Dropped, Notice, PassReport
from kvmhost.reclaim.context import DaemonContext
from kvmhost.reclaim.daemon import Daemon
from kvmhost.reclaim.errors import ConfigError
from kvmhost.reclaim.host import Host
from kvmhost.reclaim.policy.lru_gen import LruGen
from kvmhost.reclaim.pressure.limits import CpuShare
from kvmhost.reclaim.settings.config import load
from kvmhost.reclaim.settings.options import Config
from kvmhost.reclaim.vm import evictor as evictor_module
from kvmhost.reclaim.vm import worker as worker_module
from kvmhost.reclaim.vm.session import Session, VmPaused
from kvmhost.units import Bytes, Mark, Seconds, Share

N = 1000
BUDGET = {
    "budget": Mark(size=Bytes(500 * 4096)),
    "high": Mark(size=Bytes(450 * 4096)),
    "low": Mark(size=Bytes(400 * 4096)),
}


def config(vm=None, **sections) -> Config:
    """Options by section; a budget of 500 pages with marks at 450 and 400."""
    return load(None, {"defaults": BUDGET | (vm or {})} | sections)


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
        self.paused = self.given_back = False
        self.lease_asked, self.latency_ns, self.renewed = None, 0, 0

    def _meet(self, what):
        problem = self.trouble.get(what)
        if problem:
            raise problem

    def memory(self):
        self._meet("memory")
        regions = [schema.RegionInfo(0, 0, N * 4096, 0, N, 0)]
        return schema.MemoryMap(4096, N, regions, [schema.PageRange(0, 10)])

    def take_lease(self, asked):
        self._meet("lease")
        self.lease_asked = asked

    def lease(self):
        self.renewed += 1

    def give_back_lease(self):
        self.given_back = True

    def counters(self):
        pager = {"latency_sum_ns": self.latency_ns, "latency_ns": [0, 1]}
        return schema.Counters(None, None, pager)

    def set_limit(self, n_bytes):
        self._meet("limit")
        self.limit = n_bytes

    def shrink(self, n_bytes):
        self.shrunk += 1
        went = np.flatnonzero(self.here)[n_bytes // 4096 :]
        self.here[went] = False
        return len(went)

    def harvest_timed(
        self, gfn_start, n_pages, *, tracker, clear=True, rearm="young", fraction=None, mask=None
    ):
        self._meet("harvest")
        self.asked.append((gfn_start, n_pages, tracker, clear, rearm))
        young = list(self.touches(self.window))
        self.window += 1
        self.here[young] = True
        return YoungBitmap.from_gfns(0, N, young), schema.HarvestCost(3000, 2000)

    def harvest(self, gfn_start, n_pages, **how):
        """A look between two windows: nothing was touched since the last one began."""
        return YoungBitmap.from_gfns(0, N, [])

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
        return types.SimpleNamespace(running=True, paused=self.paused, vcpus=[0])

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


@pytest.fixture
def vm():
    return FakeVm()


def make_session(vm, *, policy=None, **options):
    return Session(vm, DaemonContext.of(config(options)), policy)


def test_a_budget_may_be_a_share_of_the_memory(vm):
    make_session(vm, budget=Mark(share=Share(0.3)))
    assert vm.limit == int(N * 4096 * 0.3)


def test_the_limit_is_set_before_the_first_pass(vm):
    make_session(vm)
    assert vm.limit == 500 * 4096
    assert vm.asked == []


def test_passes_age_and_evict_the_oldest_down_to_the_low_mark(vm):
    mine = make_session(vm, tracker="pagemap")
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


class SparesAllWhileYoung(LruGen):
    """Spares every page while all of them are young."""

    def age(self, young, now_ns):
        self.all_young = int(unpack(young, self.n_pages).sum()) == N
        super().age(young, now_ns)

    def victims(self, n, candidates, now_ns, probe=None):
        return super().victims(0 if self.all_young else n, candidates, now_ns)


def test_a_vm_that_is_young_everywhere_is_shrunk_by_its_own_choice(vm):
    vm.touches = lambda window: range(N) if window < 6 else range(100)
    mine = make_session(vm, policy=SparesAllWhileYoung(N))
    assert [mine.run_pass().forced_pages for _ in range(3)] == [0, 0, 0]
    fourth = mine.run_pass()
    assert (fourth.wanted_pages, fourth.evicted_pages, fourth.forced_pages) == (600, 0, 500)
    assert ", forced 500," in fourth.line()
    vm.touches = lambda window: range(100)
    shrunk = vm.shrunk
    assert [mine.run_pass().forced_pages for _ in range(3)] == [0, 0, 0]
    assert vm.shrunk == shrunk


def test_pages_that_come_back_are_counted_and_protected(vm):
    mine = make_session(vm)
    for _ in range(2):
        mine.run_pass()
    vm.here[100:150] = True
    report = mine.run_pass()
    assert report.refaulted_pages == 50
    # They are the last to go of what may go.
    assert set(vm.victims[-50:].tolist()) == set(range(100, 150))
    assert mine.run_pass().refaulted_pages == 0


def test_what_the_fault_handler_evicted_counts_as_evicted(vm):
    mine = make_session(vm)
    mine.run_pass()
    vm.here[500:600] = False
    mine.run_pass()
    vm.here[550:600] = True
    assert mine.run_pass().refaulted_pages == 50


def test_victims_are_bounded(vm):
    mine = make_session(vm, max_victims=7)
    for _ in range(2):
        mine.run_pass()
    assert vm.victims.tolist() == list(range(700, 707))


def test_a_full_store_ends_the_eviction_of_a_pass(vm, monkeypatch):
    monkeypatch.setattr(evictor_module, "BATCH_PAGES", 100)
    vm.full_after = 30
    mine = make_session(vm)
    mine.run_pass()
    report = mine.run_pass()
    assert report.outcomes == {"done": 30, "full": 70}
    assert report.resident_bytes == 970 * 4096


def test_a_stop_ends_the_eviction_between_batches(vm, monkeypatch):
    monkeypatch.setattr(evictor_module, "BATCH_PAGES", 100)
    mine = make_session(vm)
    mine.run_pass()
    stop = threading.Event()
    stop.set()
    assert mine.run_pass(stop).evicted_pages == 0


def test_the_line_has_everything(vm):
    mine = make_session(vm)
    mine.run_pass()
    line = mine.run_pass().line()
    assert line.startswith("fake pass 2: resident 1.6 MiB, young 100, generations 0:300 1:0 2:90,")
    assert "evicted 600 of 600 (budget), refaulted 0, harvest 5.0 ns/page, " in line


def test_a_dry_run_touches_nothing_and_goes_on_as_if_it_had(vm):
    mine = Session(vm, DaemonContext.of(config(daemon={"dry_run": True})))
    reports = [mine.run_pass() for _ in range(4)]
    assert (vm.limit, vm.victims, vm.lease_asked, vm.shrunk) == (None, None, None, 0)
    assert vm.here.all()
    assert [r.evicted_pages for r in reports] == [0, 600, 0, 0]
    assert reports[-1].resident_bytes == 400 * 4096
    assert "would evict 600 of 600" in reports[1].line()
    # A page that would have gone and is touched would have come back.
    vm.touches = lambda window: [*range(100), *range(150, 160)]
    assert mine.run_pass().refaulted_pages == 10
    assert mine.history.story(150).action == "came_back"
    assert mine.history.story(200).action == "would_evict"


def test_a_paused_vm_does_not_age(vm):
    mine = make_session(vm)
    for _ in range(3):
        mine.run_pass()
    before = mine.driver.policy.sizes(mine.pages.resident)
    vm.paused = True
    asked = len(vm.asked)
    for _ in range(50):
        with pytest.raises(VmPaused):
            mine.run_pass()
    assert len(vm.asked) == asked
    assert mine.driver.policy.sizes(mine.pages.resident) == before
    assert mine.totals.skipped == 50
    vm.paused = False
    assert mine.run_pass().evicted_pages == 0


def test_pages_a_second_are_kept_to(vm, monkeypatch):
    now = [100.0]
    context = DaemonContext.of(config(limits={"pages_per_s": 50}))
    monkeypatch.setattr(context.rate, "_clock", lambda: now[0])
    context.rate._at_s = now[0]
    mine = Session(vm, context)
    mine.run_pass()
    assert mine.run_pass().evicted_pages == 50
    assert mine.run_pass().evicted_pages == 0
    now[0] += 0.5
    assert mine.run_pass().evicted_pages == 25
    # A host that slept for an hour does not make up for it.
    now[0] += 3600
    assert mine.run_pass().evicted_pages == 50
    assert mine.totals.spared["the limit of 50 pages per second"] > 0


def test_what_comes_back_makes_it_hold_back_and_say_so(vm):
    """Touches in change what it just evicted: the worst guest."""
    mine = make_session(vm)
    vm.touches = lambda window: np.flatnonzero(~vm.here)[:400]
    reports = [mine.run_pass() for _ in range(12)]
    held = [r for r in reports if r.notes]
    assert "refaulted" in held[0].notes[0]
    assert "holding back" in held[0].notes[0]
    assert reports[-1].holding
    kinds = [d.kind for d in mine.context.decisions.last(1000)]
    assert "hold" in kinds
    # While it holds back it goes down to the high mark only.
    assert any(0 < r.evicted_pages < r.wanted_pages for r in reports if r.holding)


def test_every_decision_has_its_reason(vm):
    mine = make_session(vm)
    for _ in range(2):
        mine.run_pass()
    found = mine.context.decisions.last(100, vm="fake")
    assert [d.kind for d in found] == ["budget", "attach", "spare", "evict"]
    evict = found[-1]
    assert (evict.why, evict.pages, evict.passes) == ("budget", 600, 2)
    assert evict.runs == [(100, 600)]
    assert "above the high mark" in evict.text
    story = mine.history.story(100)
    assert (story.action, story.why, story.evictions) == ("evicted", "budget", 1)
    assert mine.history.story(50).windows == [True, True]


def test_a_part_of_a_shared_budget_counts_where_it_is_smaller(vm):
    context = DaemonContext.of(config(pressure={"total_budget": Bytes(300 * 4096)}))
    mine = Session(vm, context)
    mine.run_pass()
    assert vm.limit == 500 * 4096
    context.host.update()
    mine.run_pass()
    assert vm.limit == 300 * 4096


def test_stalls_of_the_vm_are_its_faults(vm, monkeypatch):
    mine = Session(
        vm,
        DaemonContext.of(
            config(pressure={"psi": "vm", "psi_target": Share(0.5), "backoff": Share(0)})
        ),
    )
    now = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    mine._last_s = 10.0
    mine.run_pass()
    now[0] += 2
    vm.latency_ns += 500_000_000
    mine.run_pass()
    assert mine.stall == 0.25
    assert mine.reclaim_target.stall_controller.drive == 0.5


# -- the loop -----------------------------------------------------------------


@pytest.fixture
def vms(monkeypatch):
    found = {}

    def connect(name):
        return found.setdefault(name, FakeVm(name))

    monkeypatch.setattr(worker_module, "Client", connect)
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


def make(vms, report, **daemon):
    """A daemon of some VMs, with passes a millisecond apart."""
    options = {"vms": vms, "interval": Seconds(0.001)} | daemon
    return Daemon(DaemonContext.of(config(daemon=options)), report)


def test_passes_end_the_daemon(vms):
    events = Events()
    assert make(["a", "b", "a"], events, passes=3).run()
    assert sorted((e.vm, e.number) for e in events) == [
        (vm, number) for vm in "ab" for number in (1, 2, 3)
    ]
    assert all(vm.given_back for vm in vms.values())


def test_stop_ends_the_daemon(vms):
    events = Events(lambda event: daemon.stop())
    daemon = make(["a"], events, interval=Seconds(1000))
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
    daemon = make(["a", "b"], events)
    assert daemon.run()
    assert events.of(Dropped) == [Dropped("a", "hung up", failed=False)]


def test_a_guest_that_ended_is_dropped(vms):
    vms["a"] = FakeVm("a")
    vms["a"].state = lambda: types.SimpleNamespace(running=False, paused=False)
    events = Events()
    assert make(["a"], events).run()
    assert events[-1] == Dropped("a", "the guest has ended", failed=False)


def test_a_vm_that_is_not_there_fails_without_wait(vms):
    vms["a"] = FakeVm("a")
    vms["a"].trouble["memory"] = VmGoneError("a", "nothing answers")
    events = Events()
    assert not make(["a"], events).run()
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
        return FakeVm.memory(vm)

    vm.memory = memory
    assert make(["a"], Events(), passes=1, wait=True).run()
    assert len(looked) == 3


def test_a_vm_without_a_pager_fails_at_once(vms):
    vms["a"] = FakeVm("a")
    vms["a"].trouble["limit"] = ControlError(501, "userfaultfd: run as root")
    events = Events()
    assert not make(["a"], events).run()
    assert [e.failed for e in events] == [True]
    assert "run as root" in events[0].reason


def test_refusals_are_retried_and_then_given_up(vms):
    vms["a"] = vm = FakeVm("a")
    vm.trouble["evict"] = ControlError(409, "busy")
    events = Events()
    assert not make(["a"], events).run()
    assert [e.number for e in events.of(PassReport)] == [1]
    assert events[-1] == Dropped("a", "busy (HTTP 409)", failed=True)
    assert vm.window == 1 + 5


def test_a_vm_with_another_daemon_is_refused_and_named(vms):
    vms["a"] = FakeVm("a")
    vms["a"].trouble["lease"] = ControlError(423, "looked after by reclaimd other (process 5)")
    events = Events()
    assert not make(["a"], events).run()
    assert "reclaimd other" in events[0].reason
    assert "--take-over" in events[0].reason


def test_a_vm_that_was_taken_over_is_let_go(vms):
    vms["a"] = FakeVm("a")

    def then(event):
        vms["a"].trouble["state"] = ControlError(423, "the lease was lost; it is with x")

    events = Events(then)
    assert not make(["a"], events).run()
    assert "it is with x" in events[-1].reason


def test_what_a_daemon_says_to_a_vm(vms):
    assert make(["a"], Events(), passes=1, name="main", lease=Seconds(2), take_over=True).run()
    asked = vms["a"].lease_asked
    assert (asked.holder, asked.ttl_s, asked.take_over) == ("reclaimd main", 2.0, True)
    assert make(["a"], Events(), passes=1, interval=Seconds(20)).run()
    assert vms["a"].lease_asked.ttl_s == 60


def test_a_vm_that_is_gone_leaves_nothing_in_the_daemon(vms):
    kept = []

    def then(event):
        if isinstance(event, PassReport):
            kept.append(weakref.ref(daemon.sessions()[0]))
            vms["a"].trouble["state"] = VmGoneError("a", "hung up")

    daemon = make(["a"], Events(then))
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
    daemon = make(["web*"], events)
    assert daemon.run()
    assert {e.vm for e in events} == {"web1", "web2"}
    assert events.of(Dropped) == [Dropped("web1", "hung up", failed=False)]


def test_a_reload_changes_what_it_can_and_says_what_it_cannot(vms):
    new = config(
        {"weight": 2.0} | {"budget": Mark(size=Bytes(400 * 4096)), "high": Mark(share=Share(1.0))},
        daemon={"vms": ["b"], "interval": Seconds(0.001), "name": "other", "passes": 0},
        limits={"pages_per_s": 7},
    )

    def then(event):
        if isinstance(event, PassReport) and event.number == 2 and event.vm == "a":
            daemon.reload()
        if isinstance(event, PassReport) and event.vm == "b" and event.number == 3:
            daemon.stop()

    events = Events(then)
    options = {"vms": ["a"], "interval": Seconds(0.001)}
    daemon = Daemon(DaemonContext.of(config(daemon=options)), events, reread=lambda: new)
    assert daemon.run()
    notice = events.of(Notice)[0]
    assert notice.text == "configuration reloaded; restart to change name"
    assert daemon.context.rate.per_s == 7
    assert vms["b"].limit == 400 * 4096
    assert vms["a"].given_back


def test_a_reload_of_a_bad_file_leaves_everything_as_it_was(vms):
    def reread():
        raise ConfigError("x.toml", 3, "daemon.interval", "invalid time '5'")

    def then(event):
        if isinstance(event, PassReport) and event.number == 2:
            daemon.reload()
        if isinstance(event, Notice):
            daemon.stop()

    events = Events(then)
    options = {"vms": ["a"], "interval": Seconds(0.001)}
    daemon = Daemon(DaemonContext.of(config(daemon=options)), events, reread=reread)
    before = daemon.context.config
    assert daemon.run()
    assert events.of(Notice)[0].failed
    assert "x.toml:3: daemon.interval" in events.of(Notice)[0].text
    assert daemon.context.config is before


def test_a_pass_that_hangs_starves_the_watchdog(vms, monkeypatch):
    fed = []
    notifier = types.SimpleNamespace(
        watchdog_s=0.03,
        alive=lambda: fed.append(1),
        status=lambda text: None,
        ready=lambda text: None,
        stopping=lambda: None,
    )
    monkeypatch.setattr("kvmhost.reclaim.daemon._STUCK_S", 0.2)
    vms["a"] = vm = FakeVm("a")
    hang, inside = threading.Event(), threading.Event()

    def counters():
        if len(fed) >= 3:
            inside.set()
            hang.wait(20)
        return FakeVm.counters(vm)

    vm.counters = counters
    options = {"vms": ["a"], "interval": Seconds(0.01)}
    daemon = Daemon(DaemonContext.of(config(daemon=options)), Events(), notifier=notifier)
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        assert inside.wait(20)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            before = len(fed)
            time.sleep(0.3)
            if len(fed) == before:
                break
        assert len(fed) == before, "a daemon that hangs is fed"
    finally:
        hang.set()
        daemon.stop()
        thread.join(20)


def test_a_signal_in_the_main_thread_ends_it(vms):
    before = signal.signal(signal.SIGUSR1, lambda *_: daemon.stop())
    try:
        events = Events(lambda event: os.kill(os.getpid(), signal.SIGUSR1))
        daemon = make(["a"], events, interval=Seconds(1000))
        assert daemon.run()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_long_rest_keeps_the_lease(vms):
    """A limit of a thousandth of a core makes for long rests after short passes."""
    vms["a"] = FakeVm("a")
    daemon = make(["a"], Events(), lease=Seconds(0.05), interval=Seconds(0.01))
    daemon.context.cpu = CpuShare(0.001)
    daemon.context.cpu._left_s = -1.0
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while vms["a"].renewed < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        daemon.stop()
        thread.join(20)
    assert vms["a"].renewed >= 5
    assert vms["a"].window == 1


def test_new_terms_of_the_lease_reach_the_vm(vm):
    context = DaemonContext.of(config(daemon={"lease": Seconds(4)}))
    mine = Session(vm, context)
    mine.run_pass()
    assert vm.lease_asked.ttl_s == 4
    assert vm.lease_asked.holder == f"reclaimd pid-{os.getpid()}"
    context.config = config(daemon={"lease": Seconds(5)})
    mine.run_pass()
    assert vm.lease_asked.ttl_s == 5


def test_the_kernels_trigger_starts_a_pass_at_once(vms):
    """Urgent data on a socket is what a trigger looks like to poll."""
    vms["a"] = vm = FakeVm("a")
    vm.touches = lambda window: range(50)
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    with sender, receiver:
        trigger = types.SimpleNamespace(fd=receiver.fileno(), close=lambda: None)
        pressure = {"psi_trigger": "some 1s in 2s", "trigger_step": Share(0.2)}
        whole = config(
            {
                "budget": Mark(size=Bytes(N * 4096)),
                "high": Mark(share=Share(1)),
                "low": Mark(share=Share(1)),
            },
            pressure=pressure,
            daemon={"vms": ["a"], "interval": Seconds(0.5)},
        )
        host = Host(whole.pressure, trigger=lambda text, path: trigger)

        def then(event):
            if event.number == 3:
                sender.send(b"!", socket.MSG_OOB)
            if event.outcomes.get("done"):
                daemon.stop()

        events = Events(then)
        daemon = Daemon(DaemonContext.of(whole, host), events)
        assert daemon.run()
    # A fifth of the resident pages. Another pass may run before the stop takes effect.
    (triggered,) = (event for event in events if event.outcomes.get("done"))
    assert triggered.why == "trigger"
    assert triggered.evicted_pages == 200
