"""The bound on the loss, against a guest that counts each of its own faults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from kvmhost.bitmap import pack, unpack
from kvmhost.reclaim.loss.bound import LEAST, LossBound, Spent
from kvmhost.reclaim.loss.clearing import ALL, ByClass, Clearing, HarvestFacts, PageClasses

N = 20_000
FAULT_NS = 20e3
#: Processor time of the vCPUs in an interval.
VCPU_NS = 1e9
Touches = Callable[[int, np.random.Generator], npt.NDArray[np.bool_]]


def hot(n_hot: int) -> Touches:
    """The same pages in each interval, and a few others at random."""

    def touch(window: int, random: np.random.Generator) -> npt.NDArray[np.bool_]:
        touched = np.zeros(N, bool)
        touched[:n_hot] = True
        touched[random.integers(0, N, 50)] = True
        return touched

    return touch


def everywhere(window: int, random: np.random.Generator) -> npt.NDArray[np.bool_]:
    """A third of all pages at random."""
    return random.random(N) < 1 / 3


def moving(window: int, random: np.random.Generator) -> npt.NDArray[np.bool_]:
    """A hot set that is another one each 20 intervals."""
    touched, start = np.zeros(N, bool), window // 20 * 5000 % N
    touched[start : start + 5000] = True
    return touched


@dataclasses.dataclass
class Run:
    """What a guest lost, by pass, and what was chosen."""

    losses: list[float]
    chosen: list[Clearing]
    bound: LossBound


def run(touches: Touches, max_loss: float, passes: int = 80) -> Run:
    """Harvest a guest; a stretched interval is several windows of it."""
    random, window = np.random.default_rng(1), 0
    is_set, armed = np.zeros(N, bool), np.zeros(N, bool)
    bound, classes = LossBound(max_loss), PageClasses(N)
    done = Run([], [], bound)
    spent = Spent(VCPU_NS, 0)
    for _ in range(passes):
        clearing = bound.choose(spent, FAULT_NS, N)
        mask = classes.mask(clearing)
        bound.note(classes.note(pack(is_set), mask))
        cleared = is_set & (True if mask is None else unpack(mask, N))
        armed |= cleared
        is_set &= ~cleared
        faults, n_windows = 0, round(clearing.stretch)
        for _ in range(n_windows):
            touched = touches(window, random)
            window += 1
            faults += int((touched & armed).sum())
            armed &= ~touched
            is_set |= touched
        spent = Spent(VCPU_NS * n_windows, faults)
        done.losses.append(faults * FAULT_NS / spent.vcpu_ns)
        done.chosen.append(clearing)
    return done


WORKLOADS = {"hot": hot(12_000), "small": hot(100), "everywhere": everywhere, "moving": moving}


@pytest.mark.parametrize("max_loss", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("name", WORKLOADS)
def test_the_mean_loss_stays_within_the_bound(name: str, max_loss: float) -> None:
    done = run(WORKLOADS[name], max_loss)
    # While nothing is known, the guest's first faults tell; from then on the bound holds.
    assert np.mean(done.losses[10:]) <= 1.1 * max_loss
    assert done.bound.loss == pytest.approx(np.mean(done.losses[-11:-1]), rel=0.3, abs=1e-3)


@pytest.mark.parametrize("name", WORKLOADS)
def test_without_a_bound_all_is_cleared(name: str) -> None:
    done = run(WORKLOADS[name], math.inf)
    assert set(done.chosen) == {ALL}


def test_unbounded_the_hot_set_costs_more_than_any_of_these_bounds() -> None:
    assert np.mean(run(WORKLOADS["hot"], math.inf).losses[10:]) > 0.2


def test_a_guest_that_costs_little_is_cleared_as_a_whole() -> None:
    assert run(hot(100), 0.03).chosen[-1] == ALL


def test_what_is_in_use_is_cleared_less_than_what_changes() -> None:
    last = run(WORKLOADS["hot"], 0.03).chosen[-1]
    assert last.steady < 1 / 4
    assert last.changing > 4 * last.steady


def test_the_interval_grows_only_below_the_least_shares() -> None:
    for chosen in run(WORKLOADS["everywhere"], 0.001).chosen[20:]:
        if chosen.stretch > 1:
            assert min(chosen.steady / LEAST.steady, chosen.changing / LEAST.changing) <= 1.25
    assert max(one.stretch for one in run(WORKLOADS["everywhere"], 0.0005).chosen) > 1


@pytest.mark.parametrize(
    ("others", "part"), [(0, 1.0), (500, 2 / 3), (1000, 1 / 3), (1400, 1 / 8), (1500, 1 / 8)]
)
def test_the_faults_of_other_readers_are_taken_from_the_bound(others: int, part: float) -> None:
    bound, young = LossBound(0.03), ByClass(5000, 0)
    for _ in range(40):
        chosen = bound.choose(Spent(VCPU_NS, others), FAULT_NS, N)
        bound.note(HarvestFacts(young, ByClass(0, 0), ByClass(0, 0)))
    assert bound.others == pytest.approx(others, rel=0.01)
    allowed = 0.03 * VCPU_NS / FAULT_NS * part
    assert chosen.steady == pytest.approx(allowed / young.steady, rel=0.3)


def test_nothing_known_clears_the_least() -> None:
    bound = LossBound(0.03)
    chosen = bound.choose(Spent(VCPU_NS, 0), FAULT_NS, 1 << 30)
    # No page is steady yet, and the interval is not stretched for what is not known.
    assert chosen == Clearing(1.0, LEAST.changing, 1.0)
    assert bound.loss == 0


def test_a_cost_of_nothing_needs_no_bound() -> None:
    bound = LossBound(0.0001)
    bound.note(HarvestFacts(ByClass(9e9, 9e9), ByClass(0, 0), ByClass(0, 0)))
    assert bound.choose(Spent(VCPU_NS, 10_000), 0.0, N) == ALL


def test_the_loss_is_that_of_the_last_ten_passes_and_forgotten_with_the_tracker() -> None:
    bound = LossBound(0.03)
    assert bound.loss is None
    for faults in [50_000] * 5 + [100] * 10:
        bound.choose(Spent(VCPU_NS, faults), FAULT_NS, N)
    assert bound.loss == pytest.approx(100 * FAULT_NS / VCPU_NS)
    bound.forget()
    assert bound.loss is None
    assert bound.others == 0
