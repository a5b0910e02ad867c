"""classic, age, random and Belady's optimum, each against something that shares no code."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhost.bitmap import pack
from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy.age import MAX_AGE, AgePolicy
from kvmhost.reclaim.policy.belady import belady
from kvmhost.reclaim.policy.classic import SWAP_CLUSTER_MAX, Classic
from kvmhost.reclaim.policy.random import Random
from kvmhost.reclaim.policy.replay import replay

MINUTE = 60_000_000_000


def words(n, gfns):
    bits = np.zeros(n, bool)
    bits[list(gfns)] = True
    return pack(bits)


# -- Belady --------------------------------------------------------------------


def fewest_refaults(windows, budget):
    """Every choice of what to keep, by brute force."""
    states = {frozenset(): 0}
    ever = set()
    for touched in windows:
        after = {}
        for resident, cost in states.items():
            cost += sum(page in ever for page in touched - resident)
            now = resident | touched
            kept = min(budget, len(now))
            for choice in itertools.combinations(sorted(now), kept):
                key = frozenset(choice)
                after[key] = min(after.get(key, cost), cost)
        ever |= touched
        states = after
    return min(states.values())


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.frozensets(st.integers(0, 5), max_size=5), min_size=1, max_size=7),
    st.integers(1, 4),
)
def test_belady_is_the_fewest_of_all_choices(windows, budget):
    trace = [(i, words(6, touched)) for i, touched in enumerate(windows)]
    assert belady(trace, 6, budget).refaults == fewest_refaults(windows, budget)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.sets(st.integers(0, 63)), min_size=1, max_size=20),
    st.integers(1, 64),
    st.sampled_from([Classic, Random, AgePolicy]),
)
def test_no_policy_beats_belady(windows, budget, policy):
    trace = [(i, words(64, touched)) for i, touched in enumerate(windows)]
    assert belady(trace, 64, budget).refaults <= replay(trace, policy(64), budget).refaults


# -- classic -------------------------------------------------------------------


class TwoLists:
    """The lists as Python lists, the tail first."""

    def __init__(self):
        self.inactive, self.active, self.gone, self.went = [], [], {}, 0

    def come_in(self, gfns):
        n_active = len(self.active)
        for gfn in gfns:
            near = gfn in self.gone and self.went - self.gone.pop(gfn) <= n_active
            (self.active if near else self.inactive).append(gfn)

    def victims(self, n, accessed):
        chosen = []
        for _ in range(2):
            self.deactivate(accessed)
            for gfn in list(self.inactive):
                if len(chosen) >= n:
                    break
                self.inactive.remove(gfn)
                if gfn in accessed:
                    accessed.discard(gfn)
                    self.active.append(gfn)
                else:
                    chosen.append(gfn)
        return chosen

    def deactivate(self, accessed):
        while self.active and len(self.inactive) < len(self.active):
            batch, self.active = self.active[:SWAP_CLUSTER_MAX], self.active[SWAP_CLUSTER_MAX:]
            accessed -= set(batch)
            self.inactive += batch

    def evict(self, gfns):
        for gfn in gfns:
            self.went += 1
            self.gone[gfn] = self.went


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sets(st.integers(0, 199), max_size=120), st.integers(0, 60)), max_size=10)
)
def test_classic_against_two_lists(bits_of_a_run):
    policy, model, resident = Classic(200, probes=True), TwoLists(), set()
    for touched, n in bits_of_a_run:
        probe = SetProbe(set(touched))
        came = sorted(touched - resident)
        policy.refaulted(np.array(came, dtype=np.int64), 0)
        model.come_in(came)
        resident |= touched
        mask = np.zeros(200, bool)
        mask[list(resident)] = True
        got = policy.victims(n, mask, 0, probe).tolist()
        assert got == model.victims(n, set(touched))
        policy.evicted(np.array(got, dtype=np.int64), 0)
        model.evict(got)
        resident -= set(got)
        assert policy.sizes(mask)[1][1] == len(model.active)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sets(st.integers(0, 63)), min_size=1, max_size=20), st.integers(1, 64))
def test_classic_decides_the_same_from_harvests_and_from_tests(windows, budget):
    trace = [(i, words(64, touched)) for i, touched in enumerate(windows)]
    ahead = replay(trace, Classic(64), budget)
    tested = replay(trace, Classic(64, probes=True), budget)
    assert ahead.refaults_by_window.tolist() == tested.refaults_by_window.tolist()
    assert tested.planned_pages == 0


class SetProbe:
    def __init__(self, young):
        self.young = young

    def clear_young(self, pages):
        raise AssertionError("classic has no batches")

    def clear_flush_young(self, gfn):
        found = gfn in self.young
        self.young.discard(gfn)
        return found


@pytest.mark.parametrize(("n_active", "deactivated"), [(60, 0), (61, 32)])
def test_classic_keeps_a_larger_part_active_in_a_large_guest(n_active, deactivated):
    """inactive_is_low(): at 1 GiB up to three active pages for each inactive one."""
    n = 1 << 18
    policy = Classic(n)
    for gfn in range(n_active):
        # Evicted and back at once: activated.
        policy.evicted(np.array([gfn]), 0)
        policy.refaulted(np.array([gfn]), 0)
    policy.refaulted(np.arange(100, 120), 0)
    candidates = np.zeros(n, bool)
    candidates[:120] = True
    candidates[n_active:100] = False
    policy.victims(0, candidates, 0)
    assert policy.counters()["deactivated"] == deactivated


def test_classic_plans_nothing_and_takes_harvested_bits_all_the_same():
    assert Classic(128).plan().pages is None
    policy = Classic(128, probes=True)
    plan = policy.plan()
    assert not plan.pages.any()
    assert not plan.batched
    policy.age(words(128, [0, 1]), 0)
    assert policy.victims(2, np.ones(128, bool), 0).tolist() == [2, 3]
    assert policy.explain(0)["list"] == "active"
    assert policy.explain(2)["list"] == "inactive"
    assert policy.counters()["activated"] == 2


# -- age -----------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.sets(st.integers(0, 29)), min_size=3, max_size=14),
    st.sampled_from([0.2, 5.0, 20.0, 100.0]),
)
def test_age_threshold_against_a_record_a_page(windows, target):
    """Harvests every 20 s: the threshold is recomputed from lists of what each touch met."""
    policy = AgePolicy(30, target_percent=target, first_harvests=9, min_harvests=1)
    idle, met, touched_lately, best, threshold = dict.fromkeys(range(30), 0), [], set(), [], 9
    minute = None
    for number, touched in enumerate(windows):
        now = number * MINUTE // 3
        minute = now if minute is None else minute
        policy.age(words(30, touched), now)
        met += [idle[page] for page in touched]
        touched_lately |= touched
        idle = {page: 0 if page in touched else age + 1 for page, age in idle.items()}
        if now - minute >= MINUTE:
            allowed = len(touched_lately) * target / 100
            fits = [n for n in range(1, MAX_AGE + 1) if sum(a >= n for a in met) <= allowed]
            best.append(fits[0])
            threshold = max(best)  # 98th percentile of fewer than 50 values
            met, touched_lately, minute = [], set(), now
        assert policy.threshold == threshold
        cold = sorted((p for p in idle if idle[p] >= threshold), key=lambda p: (-idle[p], p))
        assert policy.victims(7, np.ones(30, bool), now).tolist() == cold[:7]


def test_age_keeps_promotions_under_the_target():
    """Pages come back every so many harvests; only those beyond what is allowed are spared."""
    n, policy = 10_000, AgePolicy(10_000, target_percent=1.0, first_harvests=3, percentile=50)
    trace = []
    for second in range(240):
        touched = np.zeros(n, bool)
        touched[:5000] = True
        if second % 10 == 0:
            touched[5000:7000] = True
        trace.append((second * 1_000_000_000, pack(touched)))
    result = replay(trace, policy, budget_pages=1)
    # A budget of one page forces evictions, but the threshold comes from the touches.
    assert policy.threshold == 10
    assert result.windows == 240


def test_a_burst_raises_the_threshold_at_once_and_is_remembered():
    policy = AgePolicy(100, first_harvests=5)
    everything = words(100, range(100))
    hot = words(100, range(10))
    for second in range(121):
        policy.age(hot, second * 1_000_000_000)
    assert policy.threshold == 2
    policy.age(everything, 150_000_000_000)
    policy.age(hot, 181_000_000_000)
    raised = policy.threshold
    assert raised > 100
    for second in range(182, 500):
        policy.age(hot, second * 1_000_000_000)
    assert policy.threshold == raised


def test_age_bad_options():
    for options in (
        {"target_percent": 0},
        {"percentile": 101},
        {"first_harvests": 1},
        {"first_harvests": 256},
        {"min_harvests": 0},
    ):
        with pytest.raises(LayoutError, match="need"):
            AgePolicy(10, **options)
    for policy in (AgePolicy, Classic, Random):
        with pytest.raises(LayoutError, match="0 pages"):
            policy(0)
    for policy in (AgePolicy(8), Classic(8)):
        with pytest.raises(LayoutError, match="gfn 0x9 outside"):
            policy.explain(9)


# -- random --------------------------------------------------------------------


def test_random_draws_candidates_evenly_and_repeatably():
    mask = np.zeros(100, bool)
    mask[50:] = True
    drawn = np.zeros(100, int)
    policy = Random(100)
    for _ in range(400):
        drawn[policy.victims(10, mask, 0)] += 1
    assert not drawn[:50].any()
    # 80 expected each; six standard deviations.
    assert abs(drawn[50:] - 80).max() < 6 * 8
    assert (
        Random(100, 5).victims(9, mask, 0).tolist() == Random(100, 5).victims(9, mask, 0).tolist()
    )
