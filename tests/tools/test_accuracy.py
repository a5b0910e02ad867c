"""``kvmhost accuracy``: exact trackers pass, a wrong one is found out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
from json_page import checked

from kvmhost.bitmap import YoungBitmap, pack
from kvmhost.errors import CapabilityError
from kvmhost.machine import Machine
from kvmhost.tools import accuracy
from kvmhost.tools.accuracy import doorbells, running
from kvmhost.tools.accuracy.kinds import (
    CHANGING,
    GFN_START,
    KINDS,
    PAGES,
    WORKLOADS,
    AccuracyWorkload,
    probe_kinds,
)
from kvmhost.tools.main import run_command
from kvmhost.tools.outputs.accuracy import DoorbellRow
from kvmhost.trackers.guestpt import GuestptTracker

FEW = ("sequential", "zipf-0.99", "phases-2-vcpus")
QUICK = accuracy.AccuracySettings(workloads=FEW, epochs=10, intervals_s=(), duration_s=0.2)
ENGINES = [pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]
ONE = ["--tracker", "guestpt", "--workload", "random", "--no-cost", "--duration", "100ms"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", KINDS)
def test_every_tracker_that_works_is_exact(engine: str, name: str) -> None:
    support = probe_kinds(engine)[name]
    settings = dataclasses.replace(QUICK, engine=engine, trackers=(name,))
    if not support.works:
        with pytest.raises(CapabilityError):
            accuracy.run(settings)
        return
    report = accuracy.run(settings)
    assert {row.tracker for row in report.doorbells} == {name}
    assert report.missing == {}
    assert report.exact
    for row in report.doorbells:
        assert row.recall_ratio == 1.0
        assert row.max_new_after_harvests in (None, 1)
        assert (row.max_old_after_harvests or 1) <= 1 / row.fraction
    assert {row.fraction for row in report.doorbells} == {1, 1 / 8}
    for one in report.running:
        assert one.certain_pages > 0
        assert (one.wrong_pages, one.missed_pages) == (0, 0)
        assert 0 < one.min_precision_ratio <= one.max_precision_ratio == 1.0


@pytest.mark.requires_kvm
@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_workload_is_known_exactly(workload: str) -> None:
    row = doorbells.measure(KINDS["guestpt"], workload, WORKLOADS[workload], "kvm", 14, 1)
    assert (row.precision_ratio, row.recall_ratio) == (1.0, 1.0)
    if workload in CHANGING:
        assert (row.max_old_after_harvests, row.max_new_after_harvests) == (1, 1)


@pytest.mark.parametrize("kind", ["misses", "invents", "late"])
def test_a_wrong_tracker_is_found_out(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = GuestptTracker.harvest
    late: list[YoungBitmap] = []

    def wrong(self: GuestptTracker, *args: object, **kwargs: object) -> YoungBitmap:
        found = right(self, *args, **kwargs)
        late.append(found)
        if kind == "late":
            return late[-2] if len(late) > 1 and late[-2].n_pages == found.n_pages else found
        bits = found.as_bool()
        bits[100] = kind == "invents"
        return dataclasses.replace(found, words=pack(bits))

    monkeypatch.setattr(GuestptTracker, "harvest", wrong)
    assert accuracy.main([*ONE, "--json"]) == 1
    (report,) = checked("accuracy", capsys.readouterr().out)
    row = next(row for row in report["doorbells"] if row["fraction"] == 1)
    assert not report["exact"]
    assert (row["precision_ratio"] < 1) == (kind != "misses")
    assert (row["recall_ratio"] < 1) == (kind != "invents")
    if kind == "late":
        assert row["max_new_after_harvests"] == 2
    assert accuracy.main(ONE) == 1
    assert "NOT EXACT" in capsys.readouterr().out


def test_a_coarse_tracker_may_report_more_but_not_less() -> None:
    def is_exact(**changed: object) -> bool:
        row = DoorbellRow(
            tracker="t", workload="w", fraction=1.0, coarse=True, touches=1, reported_pages=10,
            precision_ratio=0.1, recall_ratio=1.0, mean_old_after_harvests=None,
            max_old_after_harvests=None, mean_new_after_harvests=None,
            max_new_after_harvests=None, harvest_ns_per_page=1.0, rearm_ns_per_page=1.0,
        )  # fmt: skip
        return accuracy.command._is_exact(msgspec.structs.replace(row, **changed))

    assert is_exact()
    assert not is_exact(coarse=False)
    assert is_exact(coarse=False, fraction=1 / 8)
    assert not is_exact(recall_ratio=0.999)


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "accuracy.png"
    arguments = ["--tracker", "guestpt", "--workload", "zipf-0.9", "--epochs", "4", "--quick"]
    assert accuracy.main([*arguments, "-o", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "| guestpt | zipf-0.9 | all      |    1.0000 | 1.0000 |" in out
    assert "| tracker | re-armed | 10 harvests/s |" in out
    assert "all exact" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_cost_rows_name_every_way_of_re_arming(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tracker", "guestpt", "--workload", "strided", "--duration", "100ms", "--json"]
    more = ["--interval", "100ms,50ms", "--rounds", "1", "--mem", "16M", "--fraction", "1/4"]
    assert accuracy.main(arguments + more) == 0
    (report,) = checked("accuracy", capsys.readouterr().out)
    assert report["fraction"] == 1 / 4
    rows = {(row["harvests_per_s"], row["rearm"]) for row in report["throughput"]}
    assert {rate for rate, _ in rows} == {10.0, 20.0}
    assert {"young", "1/4"} <= {rearm for _, rearm in rows}
    assert all(row["throughput_share"] > 0 for row in report["throughput"])
    assert min(report["cost"][0][name] for name in ("harvest_ns_per_page", "rearm_ns_per_page")) > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tracker", "none"],
        ["--workload", "none"],
        ["-o", "/nowhere/a.png"],
        ["-o", "a.txt"],
        ["-o", "picture"],
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_machine(*args: object, **kwargs: object) -> None:
        raise AssertionError("a machine was made")

    monkeypatch.setattr(Machine, "__init__", no_machine)
    assert run_command("accuracy", arguments) == 2


@pytest.mark.parametrize("more", [["--fraction", "2"], ["--mem", "1M"], ["--epochs", "1"]])
def test_bad_numbers(more: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        accuracy.main(more)
    assert ended.value.code == 2


def test_no_tracker_at_all() -> None:
    assert run_command("accuracy", ["--engine", "emulated", "--tracker", "dirty"]) == 126


def test_waits_are_counted_in_harvests() -> None:
    truth = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1], [0, 1, 0], [1, 1, 0]], dtype=bool)
    found = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 0]], dtype=bool)
    # Page 0 is old from epoch 1 on and reads so in 3; page 2 from 3 on, and reads so in 4.
    assert sorted(doorbells.harvests_until(truth, found, False)) == [2, 3]
    # Page 1 is new in 1 and shows in 2, page 0 in 4 at once; page 2's change is undone.
    assert sorted(doorbells.harvests_until(truth, found, True)) == [1, 2]


def test_bounds_of_a_window() -> None:
    """Doorbells 3, 5 and 7 around a harvest: 5 lies inside, 4 to 8 may have been seen."""
    workload = AccuracyWorkload("touch", {})
    params = {"gfn_start": GFN_START, "pages": PAGES, "stride": 1, "pattern": 2, "write": 0}
    params |= {"seed": 1, "count": 40}
    kind = KINDS["guestpt"]

    def touched(epochs: range) -> list[int]:
        bits = sum(workload.touched(params, e, False).astype(int) for e in epochs)
        return np.flatnonzero(bits).tolist()

    certain = running._union(workload, params, kind, [3], [5], 0)
    assert np.flatnonzero(certain).tolist() == touched(range(5, 6))
    possible = running._union(workload, params, kind, [3], [7], 1)
    assert np.flatnonzero(possible).tolist() == touched(range(4, 9))


@pytest.mark.parametrize("name", WORKLOADS)
def test_shares_of_vcpus_add_up(name: str) -> None:
    workload = WORKLOADS[name]
    defaults = {"pattern": 0, "stride": 1, "write": 0, "seed": 1, "count": 64}
    defaults |= {"cold": 16, "passes": 1, "zipf": 0, "zipf_permille": 900, "phase_every": 0}
    defaults |= {"phase_step": 768, "write_permille": 500, "scan_epochs": 16}
    params = defaults | {"gfn_start": GFN_START, "pages": PAGES} | dict(workload.params)
    for epoch in range(6):
        for only_writes in (False, True):
            shares = [
                workload.touched(params, epoch, only_writes, v) for v in range(workload.n_vcpus)
            ]
            assert np.array_equal(
                np.any(shares, axis=0), workload.touched(params, epoch, only_writes)
            )
