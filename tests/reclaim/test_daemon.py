"""The real daemon on real VMs: the budget holds, the data stays, nobody is needed."""

from __future__ import annotations

import contextlib
import json
import signal
from pathlib import Path

import pytest
from json_page import checked
from waiting import until

from kvmhost.errors import VmGoneError
from kvmhost.reclaim.pressure.cgroup import MemoryCgroup

pytestmark = [pytest.mark.requires_kvm, pytest.mark.requires_uffd]

MIB = 1 << 20
BUDGET = 24 * MIB
#: The fault handler may be one run of pages late, and the tables are pinned.
SLACK = 1 * MIB
DEADLINE_S = 60


def background_evictions(vm):
    """Evictions that the daemon asked for, not those of the fault handler."""
    pager = vm.pager()
    return pager.get("evictions", 0) - pager.get("direct_evictions", 0)


@pytest.mark.parametrize("tracker", ["guestpt", "pagemap"])
@pytest.mark.parametrize("vcpus", [1, 2])
def test_the_budget_holds_and_every_check_passes(hotcold, daemon, tracker, vcpus):
    vm = hotcold("a", "--paused", "--vcpus", str(vcpus), epochs=150)
    mine = daemon("a", "--budget", "24M", "--tracker", tracker, "--json")
    until(lambda: vm.client.state().resident_max_bytes == BUDGET, "the limit")
    vm.client.resume()
    highest, pager = 0, {}
    with contextlib.suppress(VmGoneError):
        while vm.running():
            highest = max(highest, vm.client.state().resident_bytes)
            pager = vm.pager() or pager
    assert vm.end() == 0, vm.err
    assert mine.end() == 0
    assert 0 < highest <= BUDGET + SLACK
    assert pager["fault_ins"] > 1000
    assert (pager["errors"], pager["lost_pages"]) == (0, 0)
    events = checked("reclaimd", mine.out)
    passes = [event["report"] for event in events if event["event"] == "pass"]
    assert [event["number"] for event in passes] == list(range(1, len(passes) + 1))
    assert sum(event["outcomes"].get("done", 0) for event in passes) > 1000
    assert all(len(event["generations"]) <= 4 for event in passes)
    assert events[-1]["event"] == "dropped"
    assert not events[-1]["failed"]


def test_a_hot_set_that_fits_stays(hotcold, daemon):
    """8 MiB are hot and the budget is 24: what is evicted in the end is not hot."""
    vm = hotcold("a", cold=4, scan_every=0)
    mine = daemon("a", "--budget", "24M")
    until(lambda: mine.out.count("\n") >= 10, "ten passes")
    hot = slice(1024 + 12288 // 4, 1024 + 12288 // 4 + 2048)
    until(lambda: vm.client.resident()[hot].all(), "the hot set is resident")
    first, before = vm.epochs(), vm.pager()["fault_ins"]
    vm.goes_on(20)
    # Only cold pages fault: four random ones an epoch, of which some are resident.
    faults, epochs = vm.pager()["fault_ins"] - before, vm.epochs() - first
    assert faults <= (epochs + 2) * 4
    assert vm.client.state().resident_bytes <= BUDGET + SLACK


def test_a_sample_is_enough_for_the_hot_set_to_stay(hotcold, daemon):
    """A quarter of the pages is cleared a pass; what is evicted in the end is not hot."""
    vm = hotcold("a", cold=4, scan_every=0)
    mine = daemon("a", "--budget", "24M", "--fraction", "1/4")
    until(lambda: mine.out.count("\n") >= 16, "sixteen passes")
    hot = slice(1024 + 12288 // 4, 1024 + 12288 // 4 + 2048)
    until(lambda: vm.client.resident()[hot].all(), "the hot set is resident")
    harvested = vm.client.counters().harvest
    # All that is touched reads as young, also what no turn has cleared.
    assert harvested.n_young >= harvested.harvests * 2048 / 4
    assert vm.client.state().resident_bytes <= BUDGET + SLACK


def test_a_guest_that_touches_everything_is_brought_under_the_budget(hotcold, daemon):
    """All of it is young in every window, and resident before the daemon comes."""
    vm = hotcold("a", hot=9216, scan_every=2, scan_epochs=2)
    vm.goes_on(4)
    assert vm.client.state().resident_bytes > BUDGET
    mine = daemon("a", "--budget", "24M", "--json")
    until(lambda: vm.client.state().resident_bytes <= BUDGET + SLACK, "the budget holds")
    until(lambda: '"forced_pages": 0' in mine.out, "a pass")
    vm.goes_on(2)
    assert vm.running(), vm.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_end_the_daemon_and_not_the_guest(hotcold, daemon, number, code):
    vm = hotcold("a")
    mine = daemon("a", "--budget", "24M")
    mine.wait_for("a pass 2:")
    mine.signal(number)
    assert mine.end(10) == code
    assert mine.err == ""
    assert vm.goes_on()
    # The VM keeps the limit that it was given.
    assert vm.client.state().resident_bytes <= BUDGET + SLACK


def test_a_signal_ends_a_long_wait(hotcold, start):
    hotcold("a")
    mine = start("reclaimd", "a", "--budget", "24M", "--interval", "1000")
    mine.wait_for("a pass 1:")
    mine.signal(signal.SIGTERM)
    assert mine.end(10) == 0


def test_killed_in_the_middle_of_eviction_and_taken_over(hotcold, daemon):
    vm = hotcold("a", "--vcpus", "2", scan_every=8, scan_epochs=4)
    for _ in range(6):
        before = background_evictions(vm)
        mine = daemon("a", "--budget", "16M", "--high", "70%", "--low", "40%")
        until(lambda seen=before: background_evictions(vm) > seen, "the daemon evicts")
        mine.signal(signal.SIGKILL)
        assert mine.end(10) == -signal.SIGKILL
        assert vm.goes_on()
    heir = daemon("a", "--budget", "16M", "--passes", "5", "--json")
    assert heir.end() == 0
    first = json.loads(heir.out.splitlines()[0])["report"]
    # It knows nothing yet: one generation, and what was young just now.
    assert [seq for seq, _ in first["generations"]] == [0, 1]
    state = vm.client.state()
    assert (state.running, state.status, state.error) == (True, None, None)
    assert vm.pager()["lost_pages"] == 0
    vm.client.stop()
    assert vm.end() == 0, vm.err


def test_a_vm_that_dies_is_dropped_and_the_other_is_looked_after(hotcold, daemon):
    doomed, other = hotcold("doomed"), hotcold("other")
    mine = daemon("doomed", "other", "--budget", "24M")
    mine.wait_for("doomed pass 2:")
    doomed.signal(signal.SIGKILL)
    assert doomed.end(10) == -signal.SIGKILL
    mine.wait_for("doomed dropped:")
    seen = mine.out.count("other pass")
    until(lambda: mine.out.count("other pass") > seen + 2, "passes over the other")
    assert mine.running()
    assert mine.err == ""
    other.client.stop()
    assert mine.end() == 0


def test_the_daemon_may_come_first_and_waits(hotcold, daemon):
    mine = daemon("late", "--budget", "24M", "--wait", "--passes", "2")
    vm = hotcold("late")
    assert mine.end() == 0
    assert mine.out.count("\n") == 2
    assert vm.client.state().resident_max_bytes == BUDGET


def test_without_wait_a_missing_vm_is_an_error(daemon):
    mine = daemon("nobody", "--budget", "24M")
    assert mine.end() == 1
    assert "nobody dropped: nothing answers at" in mine.err


@pytest.mark.parametrize(
    "words",
    [
        ["a"],
        ["a", "--budget", "x"],
        ["a", "--budget", "8M", "--high", "9M"],
        ["a", "--budget", "8M", "--high", "150%"],
        ["a", "--budget", "8M", "--interval", "0"],
        ["../a", "--budget", "8M", "--generations", "x"],
    ],
)
def test_wrong_words_are_wrong_usage(start, words):
    mine = start("reclaimd", *words)
    assert mine.end() == 2
    assert mine.err


def test_the_daemon_takes_little_time_and_leaves_nothing_open(hotcold, daemon):
    vm = hotcold("a", cold=4, scan_every=0)
    mine = daemon("a", "--budget", "32M", "--json")
    until(lambda: mine.out.count("\n") >= 20, "twenty passes")

    def used():
        kinds = [(mine.pid, "fd"), (mine.pid, "task"), (vm.pid, "fd")]
        return [len([*Path(f"/proc/{pid}/{kind}").iterdir()]) for pid, kind in kinds]

    def sleeps():
        text = Path(f"/proc/{mine.pid}/status").read_text()
        return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    before, slept = used(), sleeps()
    until(lambda: mine.out.count("\n") >= 40, "twenty more")
    assert used() == before
    # The main thread sleeps between passes; a busy loop never gives up its processor.
    assert sleeps() - slept >= 10


@pytest.mark.requires_cgroup
def test_under_a_cgroup_limit_only_the_daemon_saves_the_guest(hotcold, start, daemon):
    """A guest of 112 MiB and its VMM, where 112 MiB may be used in all."""
    words = ("--mem", "128M", "--paused")
    params = {"pages": 112 * 256, "hot": 2048, "epochs": 60}
    with MemoryCgroup.create("test", limit_bytes=112 * MIB) as group:
        vm = hotcold("alone", *words, **params)
        group.add_pid(vm.pid)
        vm.client.resume()
        assert vm.end() == -signal.SIGKILL
        assert group.oom_kills() == 1

        vm = hotcold("helped", *words, **params)
        group.add_pid(vm.pid)
        mine = daemon("helped", "--budget", "48M")
        until(lambda: vm.client.state().resident_max_bytes, "the limit")
        vm.client.resume()
        assert vm.end() == 0, vm.err
        assert mine.end() == 0
        assert group.oom_kills() == 1
        path = group.path
    assert not Path(path).exists()
