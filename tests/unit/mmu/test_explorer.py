"""All interleavings: the lost flush of 2009, and the harvest against everything else."""

from __future__ import annotations

import itertools
import math

import pytest

from kvmhost.mmu.explorer import BLOCKED, explore
from kvmhost.mmu.flush import LOWER_ORDERS, RAISE_ORDERS, explore_flush
from kvmhost.mmu.races import explore_harvest


def test_counts_every_schedule():
    def step(state):
        state["n"] += 1

    report = explore({"n": 0}, {"a": [step] * 3, "b": [step] * 2}, lambda s: s["n"] == 5)
    assert (report.schedules, report.failed, report.deadlocks) == (math.comb(5, 2), 0, 0)


def test_finds_the_one_bad_schedule_of_a_lost_update():
    def read(name):
        def step(state):
            state[name] = state["n"]

        return step

    def write(name):
        def step(state):
            state["n"] = state[name] + 1

        return step

    actors = {name: [read(name), write(name)] for name in "ab"}
    report = explore({"n": 0, "a": 0, "b": 0}, actors, lambda s: s["n"] == 2)
    assert (report.schedules, report.failed) == (6, 4)
    assert report.example[-1] == "end"
    assert len(report.example) == 5


def test_reports_deadlocks():
    def take(lock):
        def step(state):
            if state[lock]:
                return BLOCKED
            state[lock] = True
            return None

        return step

    def drop(*locks):
        def step(state):
            for lock in locks:
                state[lock] = False

        return step

    actors = {
        "a": [take("x"), take("y"), drop("x", "y")],
        "b": [take("y"), take("x"), drop("x", "y")],
    }
    assert explore({"x": False, "y": False}, actors, lambda s: True).deadlocks > 0


def test_an_endless_schedule_is_an_error():
    with pytest.raises(RecursionError, match="endless"):
        explore({"n": 0}, {"a": [lambda s: 0]}, lambda s: True)


RIGHT = ("zap, then raise", "read, flush, lower if unchanged")


def test_the_right_flush_order_loses_none():
    for mark in (0, 1, 2):
        report = explore_flush(*RIGHT, mark=mark)
        assert report.failed == report.deadlocks == 0
        assert report.schedules > 100


def test_the_order_found_in_review_in_2009_loses_a_flush():
    report = explore_flush("raise, then zap", "lower, then flush")
    assert report.failed > 0
    steps = list(report.example)
    # Lowered after it was raised, and flushed before the zap: nobody flushes again.
    assert steps.index("zap: _raise_mark") < steps.index("flush: _lower")
    assert steps.index("flush: _flush") < steps.index("zap: _zap")


@pytest.mark.parametrize("mark", [0, 1])
@pytest.mark.parametrize(("raises", "lowers"), list(itertools.product(RAISE_ORDERS, LOWER_ORDERS)))
def test_which_orders_lose_a_flush(raises, lowers, mark):
    """Raising before the zap is wrong with every way to lower; lowering blindly after is too."""
    loses = raises == "raise, then zap" or lowers == "flush, then lower"
    assert bool(explore_flush(raises, lowers, mark=mark).failed) == loses


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("n_others", [1, 2])
def test_compare_and_swap_is_right_against_everything(huge, n_others):
    names = ["hardware", "unmap", "map", *(["split"] if huge else [])]
    for others in itertools.combinations(names, n_others):
        for harvesters in (1, 2) if n_others == 1 else (1,):
            report = explore_harvest("swap", others, huge=huge, harvesters=harvesters)
            assert report.failed == report.deadlocks == 0, (others, report.example)


@pytest.mark.parametrize("n_others", [1, 2, 3])
def test_and_not_is_enough_on_the_last_level(n_others):
    """No table can come to be there, so there is no bit of a table to hit."""
    for others in itertools.combinations(["hardware", "unmap", "map"], n_others):
        report = explore_harvest("and-not", others, harvesters=2 if n_others < 3 else 1)
        assert report.failed == 0, (others, report.example)


def test_and_not_hits_the_table_that_a_split_made():
    report = explore_harvest("and-not", ["split"], huge=True)
    assert report.failed > 0
    assert report.example[-1] == "end"


@pytest.mark.parametrize("other", ["hardware", "unmap"])
def test_storing_back_is_wrong(other):
    """It loses a dirty bit, or brings an unmapped entry back."""
    assert explore_harvest("store", [other]).failed > 0


def test_two_harvests_that_store_report_twice():
    assert explore_harvest("store", [], harvesters=2).failed > 0
    assert explore_harvest("and-not", [], harvesters=2).failed == 0
