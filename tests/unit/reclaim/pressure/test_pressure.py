"""Stall meters, limits, shares, controllers and back-off: files and clocks of our own."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhost.errors import CapabilityError
from kvmhost.reclaim.account.decisions import EvictReason
from kvmhost.reclaim.errors import KernelFileError
from kvmhost.reclaim.host import Host
from kvmhost.reclaim.pressure.backoff import Backoff
from kvmhost.reclaim.pressure.budget import Budget
from kvmhost.reclaim.pressure.controllers import (
    BudgetController,
    Demand,
    PassFacts,
    PromotionController,
    StallController,
    largest,
)
from kvmhost.reclaim.pressure.kernelfiles import KernelFiles
from kvmhost.reclaim.pressure.limits import CpuShare, Rate
from kvmhost.reclaim.pressure.psi import SYSTEM_PSI, PsiMeter, PsiTrigger, parse_psi, parse_trigger
from kvmhost.reclaim.pressure.shares import Claim, share_budget, share_demand
from kvmhost.reclaim.settings.options import PressureOptions
from kvmhost.units import Bytes, Share


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def psi_text(some, full=0):
    return (
        f"some avg10=0.00 avg60=0.12 avg300=1.00 total={some}\n"
        f"full avg10=0.00 avg60=0.00 avg300=0.00 total={full}\n"
    )


@pytest.fixture
def tree(tmp_path):
    """A file system of the kernel's, of our own."""

    def put(path, text):
        at = tmp_path / path.lstrip("/")
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text(text)

    put(SYSTEM_PSI, psi_text(0))
    put.files = KernelFiles(tmp_path)
    return put


# -- stalls -------------------------------------------------------------------


def test_the_meter_divides_stall_by_time(tree):
    clock = Clock()
    meter = PsiMeter(files=tree.files, clock=clock)
    clock.now += 2
    tree(SYSTEM_PSI, psi_text(500_000))
    assert meter.share() == 0.25
    clock.now += 1
    assert meter.share() == 0
    # No time, no share; and a file that begins anew is no negative one.
    assert meter.share() == 0
    clock.now += 1
    tree(SYSTEM_PSI, psi_text(10))
    assert meter.share() == 0
    clock.now += 1
    tree(SYSTEM_PSI, psi_text(5_000_000))
    assert meter.share() == 1


@pytest.mark.parametrize("text", ["", "nonsense\n", "full avg10=0.00 avg60=0.00 total=3\n"])
def test_what_is_no_pressure_file(text):
    with pytest.raises(KernelFileError, match="/proc/pressure/memory"):
        parse_psi(text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(KernelFileError, match="No such file"):
        PsiMeter(files=KernelFiles(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["", "some", "some 1s", "some 1s in 2m", "any 1s in 2s", "some 3s in 2s", "some 0s in 2s"],
)
def test_bad_triggers(text):
    with pytest.raises(ValueError, match=r"trigger|window|time"):
        parse_trigger(text)


def test_triggers():
    assert parse_trigger("some 150ms in 2s") == ("some", 150_000, 2_000_000)
    assert parse_trigger(" full 1s in 10s ") == ("full", 1_000_000, 10_000_000)


@pytest.mark.skipif(not os.access(SYSTEM_PSI, os.W_OK), reason="no pressure file to write to")
def test_the_kernel_takes_a_trigger_and_refuses_a_wrong_one(tmp_path):
    with PsiTrigger("some 1999ms in 2s") as trigger:
        assert not trigger.fired(0.01)
        fd = trigger.fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    before = len(list(Path("/proc/self/fd").iterdir()))
    (tmp_path / "file").touch()
    with pytest.raises(KernelFileError):
        PsiTrigger("some 1s in 2s", str(tmp_path / "none"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_event_about_stall_from_before_arming_does_not_count(tmp_path):
    path = tmp_path / "memory"
    path.write_text(psi_text(98_000_000))
    with PsiTrigger("some 150ms in 2s", str(path)) as trigger:
        # What was written went over the beginning of this file; the kernel's does not change.
        path.write_text(psi_text(98_009_000))
        assert not trigger.counts()
        path.write_text(psi_text(98_150_000))
        assert trigger.counts()
        # From here on the kernel's own window is right.
        path.write_text(psi_text(98_150_001))
        assert trigger.counts()
        path.write_text("no numbers")
        assert trigger.counts()


# -- limits -------------------------------------------------------------------


def test_a_rate_is_kept_and_never_saved_up():
    clock = Clock()
    rate = Rate(100, clock)
    assert rate.take(150) == 100
    assert rate.take(1) == 0
    clock.now += 0.25
    assert rate.take(100) == 25
    clock.now += 1e6
    assert rate.take(1000) == 100
    rate.give_back(40)
    assert rate.take(1000) == 40
    # A clock that goes back gives nothing, and takes nothing away.
    clock.now -= 500
    assert rate.take(10) == 0
    clock.now += 0.5
    assert rate.take(100) == 50
    rate.charge(200)
    clock.now += 1
    assert rate.take(1) == 0
    assert Rate(0, clock).take(10**9) == 10**9


def test_a_rate_among_threads():
    rate = Rate(1000, lambda: 0.0)
    got = []
    threads = [
        threading.Thread(target=lambda: [got.append(rate.take(7)) for _ in range(100)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(got) == 1000


def test_a_share_of_the_processor():
    clock = Clock()
    share = CpuShare(0.02, clock)
    # Ten seconds' worth may go at once; then the rest makes up for it.
    assert share.used(0.2) == 0
    assert share.used(0.1) == pytest.approx(5.0)
    clock.now += 5
    assert share.used(0.0) == pytest.approx(0)
    assert CpuShare(0, clock).used(100) == 0


# -- shares -------------------------------------------------------------------

claims = st.dictionaries(
    st.sampled_from("abcdefg"),
    st.builds(
        lambda weight, size, working, resident, floor: Claim(
            weight, min(working, size), min(resident, size), size, min(floor, size)
        ),
        st.sampled_from([0.5, 1, 2, 10]),
        st.integers(1, 10000),
        st.integers(0, 10000),
        st.integers(0, 10000),
        st.integers(1, 50),
    ),
    max_size=6,
)


@settings(deadline=None)
@given(st.integers(0, 40000), claims)
def test_a_budget_is_given_out_whole_and_to_working_sets_first(total, given):
    parts = share_budget(total, given)
    floors = sum(claim.floor for claim in given.values())
    most = sum(claim.size for claim in given.values())
    assert sum(parts.values()) == min(max(total, floors), most)
    for name, claim in given.items():
        assert claim.floor <= parts[name] <= claim.size
    short = [n for n, c in given.items() if parts[n] < min(c.working, c.size)]
    rich = [n for n, c in given.items() if parts[n] > max(c.working, c.floor)]
    assert not (short and rich), "cold pages are kept while working sets go"


@settings(deadline=None)
@given(st.integers(0, 40000), claims)
def test_a_demand_is_met_from_cold_pages_first(pages, given):
    parts = share_demand(pages, given)
    have = {n: max(c.cold, c.resident - c.floor) for n, c in given.items()}
    assert sum(parts.values()) == min(pages, sum(have.values()))
    warm = [n for n, c in given.items() if parts[n] > c.cold]
    unused = [n for n, c in given.items() if parts[n] < c.cold]
    assert not (warm and unused), "working sets are touched while cold pages stay"


def test_weight_and_coldness():
    one = Claim(1, 100, 1000, 2000)
    assert share_budget(600, {"a": one, "b": Claim(3, 100, 1000, 2000)}) == {"a": 200, "b": 400}
    # By coldness over weight: twice as much cold gives twice as much.
    cold = Claim(1, 100, 1900, 2000)
    assert share_demand(300, {"a": one, "b": cold}) == {"a": 100, "b": 200}
    assert share_demand(300, {"a": one, "b": Claim(2, 100, 1900, 2000)}) == {"a": 150, "b": 150}


# -- controllers --------------------------------------------------------------


def facts(resident=10_000, elapsed_s=60.0, working=1000, refaulted=0, stall=0.0):
    return PassFacts(elapsed_s, resident, working, refaulted, stall)


def test_the_budget_wants_down_to_low_and_must_go_down_to_high():
    by = BudgetController(Budget(1000 * 4096, 900 * 4096, 800 * 4096))
    assert by.demand(facts(resident=900)).pages == 0
    want = by.demand(facts(resident=950))
    assert (want.pages, want.required, want.why) == (150, 50, EvictReason.BUDGET)


def test_the_step_shrinks_towards_the_target_of_stall():
    by = StallController(0.01, 0.06)
    assert by.demand(facts()).pages == 600
    assert by.demand(facts(stall=0.005)).pages == 300
    assert by.demand(facts(stall=0.01)).pages == 0
    assert by.demand(facts(stall=0.5)).pages == 0
    assert by.demand(facts()).required == 0
    # Fractions of a page add up; a host that slept makes up for a minute at most.
    assert sum(by.demand(facts(elapsed_s=0.05)).pages for _ in range(1200)) == pytest.approx(
        600, abs=1
    )
    assert by.demand(facts(elapsed_s=86400)).pages == 600
    assert by.demand(facts(elapsed_s=-5)).pages == 0


def test_promotions_steer_the_step():
    by = PromotionController(0.002, 0.06)
    pages = [by.demand(facts(elapsed_s=1)).pages for _ in range(60)]
    assert pages[-1] >= pages[0]
    assert by.share == 1.0
    want = by.demand(facts(elapsed_s=1, refaulted=50))
    assert (want.pages, by.share) == (0, 0.5)
    assert by.rate > 0.002
    for _ in range(300):
        by.demand(facts(elapsed_s=1))
    assert by.share == 1.0


def test_the_largest_want_is_followed_and_every_must():
    wants = [Demand(10, 0, EvictReason.PSI, "a"), Demand(7, 7, EvictReason.CGROUP, "b")]
    assert largest(wants) == Demand(10, 7, EvictReason.PSI, "a")
    assert largest([]).pages == 0


# -- back-off -----------------------------------------------------------------


def test_holding_back_begins_doubles_and_ends():
    backoff = Backoff(0.2, 1.0)
    assert backoff.note(1000, 0, 1) is None
    change = backoff.note(1000, 900, 2)
    assert change.holding
    assert "more than 20%: holding back for 1 s" in change.reason
    assert backoff.note(0, 0, 2.5) is None
    assert "for 2 s" in backoff.note(0, 100, 3.5).reason
    assert "for 4 s" in backoff.note(0, 100, 6).reason
    change = backoff.note(20000, 0, 30)
    assert not change.holding
    assert not backoff.holding
    backoff.note(1000, 0, 31)
    assert "for 1 s" in backoff.note(1000, 20000, 32).reason


def test_few_pages_are_no_evidence_and_zero_is_never():
    backoff = Backoff(0.2, 1.0)
    assert backoff.note(100, 100, 1) is None
    off = Backoff(0, 1.0)
    assert off.note(1000, 1000, 1) is None
    backoff.note(1000, 1000, 2)
    assert backoff.holding
    backoff.threshold = 0
    assert not backoff.note(0, 0, 3).holding


# -- the host -----------------------------------------------------------------


def test_a_cgroup_near_its_limit_demands_and_the_coldest_give(tree):
    tree("/cg/memory.current", str(100 << 20))
    tree("/cg/memory.max", str(100 << 20))
    tree("/cg/memory.stat", f"anon 5\ninactive_file {6 << 20}\n")
    host = Host(PressureOptions(cgroup="/cg"), tree.files, Clock())
    host.claim("warm", Claim(1, 9000, 9000, 20000))
    host.claim("cold", Claim(1, 100, 9100, 20000))
    host.update()
    demand = host.demand("cold")
    # 94 MiB are needed, 90 allowed.
    assert (demand.pages, demand.required, demand.why) == (1024, 1024, EvictReason.CGROUP)
    assert host.demand("cold") is None
    assert host.demand("warm") is None
    host.update()
    host.update()
    assert host.demand("cold").pages == 1024


def test_cgroup_version_1_and_no_limit(tree):
    tree("/cg/memory.usage_in_bytes", str(100 << 20))
    tree("/cg/memory.limit_in_bytes", str(9223372036854771712))
    tree("/cg/memory.stat", f"total_inactive_file {6 << 20}\n")
    with pytest.raises(CapabilityError, match="a memory limit, its own or of a cgroup above it"):
        Host(PressureOptions(cgroup="/cg"), tree.files, Clock())
    tree("/cg/memory.limit_in_bytes", str(94 << 20))
    host = Host(PressureOptions(cgroup="/cg"), tree.files, Clock())
    host.claim("a", Claim(1, 0, 9000, 20000))
    host.update()
    assert host.demand("a").pages > 0
    tree("/cg/memory.limit_in_bytes", str(9223372036854771712))
    host.update()
    assert host.demand("a") is None
    assert "a memory limit" in host.problem
    with pytest.raises(CapabilityError, match=r"memory\.current"):
        Host(PressureOptions(cgroup="/none"), tree.files)


def test_a_limit_above_the_cgroup_counts_with_the_usage_there(tree):
    """The VM uses 50 of its 200 MiB; its siblings fill the 140 MiB that are above them all."""
    for path, usage, limit in (
        ("/top", 139, 140),
        ("/top/vms", 139, None),
        ("/top/vms/a", 50, 200),
    ):
        tree(f"{path}/memory.current", str(usage << 20))
        tree(f"{path}/memory.max", "max" if limit is None else str(limit << 20))
        tree(f"{path}/memory.high", "max")
    host = Host(PressureOptions(cgroup="/top/vms/a"), tree.files, Clock())
    host.claim("a", Claim(1, 0, 9000, 50000))
    host.update()
    demand = host.demand("a")
    assert demand.pages == 13 << 8  # 139 - 0.9 * 140 MiB
    assert demand.text.startswith("/top is at 139 MiB")
    assert (host.cgroup_bytes, host.cgroup_limit_bytes) == (139 << 20, 140 << 20)
    tree("/top/vms/memory.high", str(100 << 20))
    host.update()
    assert host.demand("a").text.startswith("/top/vms is at 139 MiB, above 90 MiB")


def test_a_trigger_demands_a_step_of_all(tree):
    options = PressureOptions(psi_trigger="some 1s in 2s", trigger_step=Share(0.1))
    host = Host(options, tree.files, Clock(), trigger=None)
    host.claim("a", Claim(1, 0, 1001, 2000))
    host.claim("b", Claim(1, 0, 3001, 4000))
    host.update()
    assert host.demand("a") is None
    host.update(fired=True)
    assert (host.demand("a").pages, host.demand("b").pages) == (100, 300)
    assert host.trigger_fired == 1


def test_a_shared_budget_and_a_vm_that_leaves(tree):
    host = Host(PressureOptions(total_budget=Bytes(1000 * 4096)), tree.files, Clock())
    host.claim("a", Claim(1, 100, 1000, 2000))
    host.claim("b", Claim(1, 100, 1000, 2000))
    assert host.budget_pages("a") is None
    host.update()
    assert (host.budget_pages("a"), host.budget_pages("b")) == (500, 500)
    host.forget("b")
    host.update()
    assert (host.budget_pages("a"), host.budget_pages("b")) == (1000, None)


def test_a_file_that_goes_away_is_said_once_and_the_rest_goes_on(tree, caplog):
    options = PressureOptions(psi_target=Share(0.01), total_budget=Bytes(4096 * 10))
    host = Host(options, tree.files, Clock())
    host.claim("a", Claim(1, 1, 10, 20))
    (tree.files.root / SYSTEM_PSI.lstrip("/")).unlink()
    host.update()
    host.update()
    assert "No such file" in host.problem
    assert caplog.text.count("No such file") == 1
    assert host.budget_pages("a") == 10
    tree(SYSTEM_PSI, psi_text(0))
    host.update()
    assert host.problem == ""
