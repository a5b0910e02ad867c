"""The harvest benchmarks run in small, and their figures are of the right kind.

Speed itself is not tested: a busy machine would make such a test lie.
"""

from __future__ import annotations

import itertools

import pytest
from json_page import checked

from kvmhost.machine import Machine
from kvmhost.tools.accuracy.kinds import GFN_START, KINDS
from kvmhost.tools.bench import harvest, sampling
from kvmhost.tools.main import run_command
from kvmhost.tools.throughput import ThroughputPlan, harvest_once, measure_steps, paired_rates

MEM_BYTES = 16 << 20


@pytest.mark.requires_kvm
def test_harvest_in_small(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--mem", "16M", "--duration", "50ms", "--rounds", "1"]
    assert harvest.main([*small, "--json"]) == 0
    (result,) = checked("bench harvest", capsys.readouterr().out)
    assert {"guestpt", "dirty"} <= {row["tracker"] for row in result["trackers"]} <= set(KINDS)
    assert result["parameters"]["hot_pages"] == 409
    for row in result["trackers"]:
        assert row["bare_refault_s"] == pytest.approx(409 * row["refault_ns_per_page"] / 1e9)
        assert row["min_lost_share"] <= row["lost_share"] <= row["max_lost_share"]
    assert harvest.main([*small, "--tracker", "guestpt"]) == 0
    assert "times the bare re-faults (bound 1.3)" in capsys.readouterr().out


@pytest.mark.requires_kvm
def test_sampling_in_small(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--mem", "16M", "--duration", "50ms", "--rounds", "1", "--fraction", "1/3", "--json"]
    assert sampling.main(words) == 0
    (found,) = checked("bench sampling", capsys.readouterr().out)
    (row,) = found["fractions"]
    assert row["fraction"] == pytest.approx(1 / 3)
    # Every page has its turn in three harvests, and no sooner than chance has it.
    assert row["recall_ratio"] == 1.0
    assert (row["max_old_after_harvests"], row["max_new_after_harvests"]) == (3, 1)
    assert row["mean_old_after_harvests"] == pytest.approx(2, abs=0.2)


@pytest.mark.requires_kvm
def test_steps_and_paired_rates_of_a_guest() -> None:
    plans = [ThroughputPlan(20), ThroughputPlan(20, whole=True), ThroughputPlan(20, period=4)]
    with harvest.hot_machine(KINDS["guestpt"], MEM_BYTES, 400) as machine:
        machine.run_epoch()
        tracker = machine.use_tracker("guestpt")
        steps = measure_steps(machine, tracker, GFN_START, 400, 3)
        assert min(steps.scan_ns, steps.rearm_ns) > 0
        machine.step_by_doorbell(False)
        kept = paired_rates(machine, tracker, plans, 2, 0.05, lambda plan: 0.1)
    assert list(kept) == plans
    assert all(len(values) == 2 for values in kept.values())
    assert all(min(one.wall, one.cpu) > 0 for values in kept.values() for one in values)
    assert [plan.rearm for plan in plans] == ["young", "all", "1/4"]


@pytest.mark.parametrize(
    "engine", [pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]
)
def test_a_sampled_harvest_clears_its_share(engine: str) -> None:
    from kvmhost.guests import image_path

    params = {"gfn_start": GFN_START, "pages": 1000, "epochs": 0}
    with Machine(image_path("touch"), mem_bytes=MEM_BYTES, engine=engine, params=params) as machine:
        machine.step_by_doorbell()
        tracker = machine.use_tracker("guestpt")
        machine.run_epoch()
        left = []
        for turn in range(5):
            left.append(tracker.harvest(GFN_START, 1000, clear=False).count())
            harvest_once(tracker, GFN_START, 1000, ThroughputPlan(1, period=5), turn)
        assert left[0] == 1000
        assert all(100 < a - b < 300 for a, b in itertools.pairwise(left))
        assert tracker.harvest(GFN_START, 1000).count() == 0


@pytest.mark.requires_kvm
@pytest.mark.parametrize("words", [["harvest", "--tracker", "no"], ["sampling", "--tracker", "no"]])
def test_unknown_trackers_are_usage(words: list[str]) -> None:
    assert run_command("bench", words) == 2
