"""Replay against a model that keeps sets of pages and shares no code with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhost.bitmap import pack, unpack
from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy.base import Everything, HarvestPlan
from kvmhost.reclaim.policy.replay import TABLE_PAGES, WRONG_WITHIN, replay, tables_of

N_PAGES = 24


def words(*gfns, n=N_PAGES):
    bits = np.zeros(n, bool)
    bits[list(gfns)] = True
    return pack(bits)


class Lowest:
    """Evicts the lowest gfn first, and notes what it is told."""

    name = "lowest"

    def __init__(self, n_pages=N_PAGES, spares=()):
        self.n_pages, self.spares, self.calls = n_pages, set(spares), []

    def plan(self, tables_young=None):
        return Everything

    def refaulted(self, gfns, now_ns):
        self.calls.append(("in", now_ns, gfns.tolist()))

    def age(self, young, now_ns):
        self.calls.append(("young", now_ns, np.flatnonzero(unpack(young, self.n_pages)).tolist()))

    def victims(self, n, candidates, now_ns, probe=None):
        pages = [p for p in np.flatnonzero(candidates) if p not in self.spares]
        return np.array(pages[:n], dtype=np.int64)

    def evicted(self, gfns, now_ns):
        self.calls.append(("out", now_ns, gfns.tolist()))

    def sizes(self, pages):
        return []

    def counters(self):
        return {}

    def explain(self, gfn):
        return {}


def test_one_run_by_hand():
    policy = Lowest()
    windows = [(10, words(0, 1, 2)), (20, words(3)), (30, words(0)), (40, words(3))]
    result = replay(windows, policy, budget_pages=2)
    assert policy.calls == [
        ("in", 10, [0, 1, 2]),
        ("young", 10, [0, 1, 2]),
        ("out", 10, [0]),
        ("in", 20, [3]),
        ("young", 20, [3]),
        ("out", 20, [1]),
        ("in", 30, [0]),
        ("young", 30, [0]),
        ("out", 30, [0]),
        ("in", 40, []),
        ("young", 40, [3]),
    ]
    assert (result.touches, result.first_touches, result.refaults) == (6, 4, 1)
    assert (result.evictions, result.wrong_evictions, result.forced_evictions) == (3, 1, 0)
    assert result.resident.tolist() == [2, 2, 2, 2]
    assert result.refaults_by_window.tolist() == [0, 0, 1, 0]
    assert result.hit_ratio == 0.5


def test_what_a_policy_protects_goes_by_force_the_least_seen_first():
    policy = Lowest(spares=range(N_PAGES))
    windows = [(1, words(0, 1)), (2, words(1, 2)), (3, words(1))]
    result = replay(windows, policy, budget_pages=2)
    # After window 2, pages 0 and 2 were seen once each, 1 twice.
    assert ("out", 2, [0]) in policy.calls
    assert result.forced_evictions == result.evictions == 1


def test_a_late_refault_is_not_a_wrong_eviction():
    quiet = [(2 + i, words()) for i in range(WRONG_WITHIN)]
    late = replay([(1, words(0, 1)), *quiet, (9, words(0))], Lowest(), 1)
    assert (late.refaults, late.wrong_evictions) == (1, 0)
    soon = replay([(1, words(0, 1)), *quiet[1:], (9, words(0))], Lowest(), 1)
    assert (soon.refaults, soon.wrong_evictions) == (1, 1)


class Lazy(Lowest):
    """Harvests nothing, and probes what it evicts."""

    def plan(self, tables_young=None):
        return HarvestPlan(words())

    def victims(self, n, candidates, now_ns, probe=None):
        self.seen = [g for g in np.flatnonzero(candidates) if probe.clear_flush_young(int(g))]
        batch = probe.clear_young(pack(candidates))
        assert not batch.any()
        return super().victims(n, candidates, now_ns)


def test_bits_outside_the_plan_wait_for_the_probe():
    policy = Lazy()
    result = replay([(1, words(4, 5)), (2, words(5)), (3, words(4, 6))], policy, 2)
    assert [call for call in policy.calls if call[0] == "young"] == [
        ("young", now, []) for now in (1, 2, 3)
    ]
    assert policy.seen == [4, 5, 6]
    assert (result.planned_pages, result.probed_pages) == (0, 6)


def test_tables_of():
    bits = np.zeros(3 * TABLE_PAGES + 64, bool)
    bits[[0, 2 * TABLE_PAGES - 1, 3 * TABLE_PAGES]] = True
    assert unpack(tables_of(pack(bits)), 4).tolist() == [True, True, False, True]


def test_bad_input():
    with pytest.raises(LayoutError, match="a budget of 0 pages"):
        replay([], Lowest(), 0)
    with pytest.raises(LayoutError, match="window 1 ends at 1 ns"):
        replay([(2, words()), (1, words())], Lowest(), 1)
    with pytest.raises(LayoutError, match="need 1 64-bit words for 24 pages"):
        replay([(2, words(n=100))], Lowest(), 1)

    class Twice(Lowest):
        def victims(self, n, candidates, now_ns, probe=None):
            return np.array([1, 1])

    with pytest.raises(LayoutError, match="or twice one"):
        replay([(1, words(0, 1, 2))], Twice(), 1)

    class Absent(Lowest):
        def victims(self, n, candidates, now_ns, probe=None):
            return np.array([9])

    with pytest.raises(LayoutError, match="not a candidate"):
        replay([(1, words(0, 1, 2))], Absent(), 1)


@settings(deadline=None)
@given(
    st.lists(st.sets(st.integers(0, N_PAGES - 1)), min_size=1, max_size=20),
    st.integers(1, N_PAGES),
    st.sets(st.integers(0, N_PAGES - 1)),
)
def test_against_sets(windows, budget, spares):
    resident, last_out = set(), {}
    refaults = first = evictions = wrong = forced = 0
    for now, touched in enumerate(windows):
        for page in touched - resident:
            refaults += page in last_out
            first += page not in last_out
            wrong += page in last_out and now - last_out[page] <= WRONG_WITHIN
        resident |= touched
        chosen = sorted(resident - spares)[: max(len(resident) - budget, 0)]
        resident -= set(chosen)

        def seen(page, now=now):
            return sum(page in windows[w] for w in range(max(0, now - 7), now + 1))

        more = sorted(resident, key=lambda p: (seen(p), p))[: max(len(resident) - budget, 0)]
        resident -= set(more)
        evictions += len(chosen) + len(more)
        forced += len(more)
        last_out |= dict.fromkeys([*chosen, *more], now)
    result = replay(enumerate(words(*w) for w in windows), Lowest(spares=spares), budget)
    assert (result.refaults, result.first_touches) == (refaults, first)
    assert (result.evictions, result.wrong_evictions) == (evictions, wrong)
    assert result.forced_evictions == forced
    assert int(result.resident[-1]) == len(resident)


class LowHalf(Lowest):
    """Harvests the first 100 pages, and probes two pages above them one by one."""

    def plan(self, tables_young=None):
        return HarvestPlan(words(*range(100), n=self.n_pages))

    def victims(self, n, candidates, now_ns, probe=None):
        tested = [gfn for gfn in (128, 199) if probe.clear_flush_young(gfn)]
        self.calls.append(("tested", now_ns, tested))
        return super().victims(n, candidates, now_ns)


def test_a_plan_of_a_part_takes_the_bits_of_that_part_only():
    policy = LowHalf(200)
    touched = [{3, 99, 128}, {199}, {3, 128}, {4}]
    replay([(i, words(*pages, n=200)) for i, pages in enumerate(touched)], policy, 1)
    told = [call for call in policy.calls if call[0] in ("young", "tested")]
    assert told == [
        ("young", 0, [3, 99]), ("tested", 0, [128]),
        ("young", 1, []), ("tested", 1, [199]),
        ("young", 2, [3]), ("tested", 2, [128]),
        ("young", 3, [4]), ("tested", 3, []),
    ]  # fmt: skip


class Batches(Lowest):
    """Harvests nothing, and probes 100 pages at a time, twice."""

    def plan(self, tables_young=None):
        return HarvestPlan(words(n=self.n_pages))

    def victims(self, n, candidates, now_ns, probe=None):
        for batch in (range(100), range(100), range(100, 200)):
            found = probe.clear_young(words(*batch, n=self.n_pages))
            tested = np.flatnonzero(unpack(found, self.n_pages)).tolist()
            self.calls.append(("tested", now_ns, tested))
        return super().victims(n, candidates, now_ns)


def test_a_probe_of_many_pages_clears_their_bits_and_no_others():
    policy = Batches(200)
    result = replay([(0, words(3, 70, 150, n=200)), (1, words(70, n=200))], policy, 1)
    assert [pages for kind, _, pages in policy.calls if kind == "tested"] == [
        [3, 70], [], [150],
        [70], [], [],
    ]  # fmt: skip
    assert result.probed_pages == 600
