"""Replays of records: the same as a replay by hand, here and on workers."""

from __future__ import annotations

import os

import pytest

from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.reclaim.analyse import whatif
from kvmhost.reclaim.policy.lru_gen import LruGen
from kvmhost.reclaim.policy.replay import replay
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.tools.main import main

LISTS = [[*range(40), *range(100 + 3 * t, 140 + 3 * t)] for t in range(30)]


def pages(n):
    return lambda record: n


def test_cases_are_all_combinations(make_record):
    paths = [make_record(LISTS, name=f"r{i}").path for i in range(2)]
    grid = {"n_generations": [4, 6], "seed": [None, 3]}
    cases = whatif.cases_of(paths, ["lru_gen"], [pages(50), pages(90)], grid, (2, -1))
    assert len(cases) == len(set(cases)) == 2 * 4 * 2
    assert {(case.first, case.end) for case in cases} == {(2, 29)}
    assert cases[0].settings() == "lru_gen n_generations=4 seed=None"


def test_an_outcome_is_what_a_replay_says(make_record):
    record = make_record(LISTS)
    (case,) = whatif.cases_of([record.path], ["lru_gen"], [pages(60)], {})
    found = whatif.run_case(case)
    timed = [((t + 1) * 10**9, bitmap.words) for t, bitmap in enumerate(record.bitmaps())]
    wanted = replay(timed, LruGen(256), 60)
    assert wanted.refaults > 0
    assert (found.refaults, found.evictions) == (wanted.refaults, wanted.evictions)
    assert found.minutes == pytest.approx(0.5)
    assert found.refaults_per_min == pytest.approx(wanted.refaults / 0.5)
    seen, saved = set(), []
    for gfns, resident in zip(LISTS, wanted.resident, strict=True):
        seen |= set(gfns)
        saved.append(len(seen) - resident)
    assert found.saved_pages == pytest.approx(sum(saved) / len(saved))


def test_more_memory_saves_less(make_record):
    record = make_record(LISTS)
    budgets = [pages(n) for n in (50, 100, 200)]
    cases = whatif.cases_of([record.path], ["lru_gen"], budgets, {})
    outcomes = whatif.run_cases(cases, workers=0)
    assert [o.case for o in outcomes] == cases
    saved = [o.saved_pages for o in outcomes]
    assert saved == sorted(saved, reverse=True)


def test_what_cannot_be(make_record):
    path = make_record(LISTS).path
    with pytest.raises(LayoutError, match="unknown policy 'best'"):
        whatif.cases_of([path], ["best"], [pages(5)], {})
    with pytest.raises(LayoutError, match="colour"):
        whatif.cases_of([path], ["lru_gen"], [pages(5)], {"colour": ["red"]})
    with pytest.raises(LayoutError, match="generations"):
        whatif.cases_of([path], ["lru_gen"], [pages(5)], {"n_generations": [1]})
    with pytest.raises(LayoutError, match="budget of 0 pages"):
        whatif.cases_of([path], ["lru_gen"], [pages(0)], {})


@pytest.mark.filterwarnings("ignore")  # of Dask's own, about ports and its event loops
def test_on_workers_and_on_a_cluster_by_address(make_record):
    distributed = pytest.importorskip("distributed")
    record = make_record(LISTS)
    cases = whatif.cases_of([record.path], ["lru_gen"], [pages(60), pages(120)], {})
    here = [o.refaults for o in whatif.run_cases(cases, workers=0)]
    done = []
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as cluster:
        outcomes = whatif.run_cases(
            cases, scheduler=cluster.scheduler_address, on_done=lambda: done.append(1)
        )
    assert [o.refaults for o in outcomes] == here
    assert len(done) == 2


@pytest.mark.filterwarnings("ignore")
def test_no_cluster_at_the_address(make_record):
    pytest.importorskip("distributed")
    record = make_record(LISTS)
    cases = whatif.cases_of([record.path], ["lru_gen"], [pages(60)], {})
    with pytest.raises(CapabilityError, match="scheduler"):
        whatif.run_cases(cases, scheduler="nonsense://x")


def test_a_record_that_begins_elsewhere_than_gfn_0(make_record):
    moved = make_record([[g + 4096 for g in row] for row in LISTS], gfn_start=4096, name="moved")
    plain = make_record(LISTS, name="plain")
    outcomes = [
        whatif.run_case(whatif.cases_of([r.path], ["lru_gen"], [pages(60)], {})[0])
        for r in (moved, plain)
    ]
    assert outcomes[0].refaults == outcomes[1].refaults
    with YoungRecord.open(moved.path) as record:
        assert record.gfn_start == 4096


def test_workers_that_do_not_start(make_record, monkeypatch, capfd):
    """As under ``ulimit -v``: the tracebacks of the workers stay off the terminal."""
    distributed = pytest.importorskip("distributed")

    def fail(**given):
        os.write(2, b"Traceback (most recent call last): of a worker")
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr(distributed, "LocalCluster", fail)
    path = make_record(LISTS).path
    cases = whatif.cases_of([path], ["lru_gen"], [pages(60)], {})
    with pytest.raises(CapabilityError, match=r"which did not start \(Nanny failed .* --workers 0"):
        whatif.run_cases(cases, workers=2)
    assert capfd.readouterr().err == ""
    # The command replays in its own process, if it was not told how many workers there are.
    assert main(["young", "whatif", str(path), "--budget", "50%", "--no-check"]) == 0
    shown = capfd.readouterr()
    assert "lru_gen" in shown.out
    assert shown.err.count("\n") == 1
    assert "worker processes did not start (Nanny failed to start.)" in shown.err
    words = ["young", "whatif", str(path), "--budget", "50%", "--no-check", "--workers", "2"]
    assert main(words) == 126
