"""One pass over a VM: what it evicts, spares, records and asks of the VM."""

from __future__ import annotations

import logging
import os
import threading
import time

import msgspec
import numpy as np
import pytest
from fake_vm import FakeVm, N, config, make_session

from kvmhost.bitmap import unpack
from kvmhost.reclaim.context import DaemonContext
from kvmhost.reclaim.policy.lru_gen import LruGen
from kvmhost.reclaim.vm import evictor as evictor_module
from kvmhost.reclaim.vm.session import Session, VmPaused
from kvmhost.units import Bytes, Mark, Seconds, Share


@pytest.fixture
def vm():
    return FakeVm()


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


def test_a_budget_that_the_vm_cannot_reach_is_logged_once(vm, caplog):
    vm.touches, vm.over_pages = lambda window: range(N), 7
    mine = make_session(vm, policy=SparesAllWhileYoung(N))
    shrink = vm.shrink
    vm.shrink = lambda n_bytes: msgspec.structs.replace(shrink(n_bytes), evicted_pages=0)
    with caplog.at_level(logging.WARNING, "reclaim"):
        for _ in range(6):
            vm.here[:] = True
            mine.run_pass()
    assert vm.shrunk > 1
    (line,) = [r.getMessage() for r in caplog.records if "above the budget" in r.getMessage()]
    assert "7 pages above the budget" in line
    assert mine.evictor.over_pages == 7


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
    assert mine.totals.spared["rate_limit"] > 0


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
    both = [r for r in reports if r.holding and 0 < r.evicted_pages < r.wanted_pages]
    assert all("(budget) while holding back" in report.line() for report in both)
    assert both
    spared = [d.text for d in mine.context.decisions.last(1000) if d.kind == "spare"]
    assert any("holding back, but evicting" in why and "budget" in why for why in spared)
    # The labels of the metric are few, and have no figures in them.
    assert mine.totals.spared.keys() <= {"holding", "rate_limit", "protected"}


def test_every_decision_has_its_reason(vm):
    mine = make_session(vm)
    for _ in range(2):
        mine.run_pass()
    found = mine.context.decisions.last(100, vm="fake")
    assert [d.kind for d in found] == ["budget", "attach", "spare", "evict"]
    evict = found[-1]
    assert (evict.why, evict.n_pages, evict.passes) == ("budget", 600, 2)
    assert evict.ranges == [(100, 600)]
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


def test_new_terms_of_the_lease_reach_the_vm(vm):
    context = DaemonContext.of(config(daemon={"lease": Seconds(4)}))
    mine = Session(vm, context)
    mine.run_pass()
    assert vm.lease_asked.ttl_s == 4
    assert vm.lease_asked.holder == f"reclaimd pid-{os.getpid()}"
    context.config = config(daemon={"lease": Seconds(5)})
    mine.run_pass()
    assert vm.lease_asked.ttl_s == 5
