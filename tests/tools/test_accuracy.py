"""``kvmhost accuracy``: exact trackers pass, a wrong one is found out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from kvmhost.bitmap import YoungBitmap, pack
from kvmhost.trackers import NAMES, probe_all
from kvmhost.trackers.guestpt import GuestptTracker
from tools import accuracy
from tools.main import run_command

FEW = ("sequential", "random-writes", "hotcold-2-vcpus")
QUICK = accuracy.Settings(workloads=FEW, epochs=10, rates=(), seconds=0.3)


@pytest.mark.parametrize(
    "engine", [pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]
)
def test_every_tracker_that_works_is_exact(engine: str) -> None:
    report = accuracy.run(dataclasses.replace(QUICK, engine=engine))
    working = {name for name, support in probe_all(engine).items() if support.works}
    assert {row["tracker"] for row in report["epochs"]} == working
    assert set(report["missing"]) == set(NAMES) - working
    assert report["exact"]
    for row in report["epochs"]:
        assert row["recall"] == 1.0
        assert row["new_after_max"] in (None, 1)
        assert (row["old_after_max"] or 1) <= row["period"]
    for row in report["free"]:
        assert row["certain"] > 0
        assert (row["wrong"], row["missed"]) == (0, 0)


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
    arguments = ["--tracker", "guestpt", "--workload", "random", "--no-cost", "--json"]
    assert accuracy.main([*arguments, "--seconds", "0.2"]) == 1
    report = json.loads(capsys.readouterr().out)
    row = next(row for row in report["epochs"] if row["period"] == 1)
    assert not report["exact"]
    assert (row["precision"] < 1) == (kind != "misses")
    assert (row["recall"] < 1) == (kind != "invents")
    if kind == "late":
        assert row["new_after_max"] == 2


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "accuracy.png"
    arguments = ["--tracker", "guestpt", "--workload", "strided", "--epochs", "4"]
    assert accuracy.main([*arguments, "--seconds", "0.2", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "strided" in out
    assert "10 harvests a second" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments", [["--tracker", "none"], ["--workload", "none"], ["--plot", "/nowhere/a.png"]]
)
def test_bad_arguments(arguments: list[str]) -> None:
    assert run_command("accuracy", arguments) == 2


def test_waits_are_counted_in_harvests() -> None:
    truth = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1], [0, 1, 0], [1, 1, 0]], dtype=bool)
    found = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 0]], dtype=bool)
    # Page 0 is old from epoch 1 on and reads so in 3; page 2 from 3 on, and reads so in 4.
    assert sorted(accuracy._harvests_until(truth, found, False)) == [2, 3]
    # Page 1 is new in 1 and shows in 2, page 0 in 4 at once; page 2's change is undone.
    assert sorted(accuracy._harvests_until(truth, found, True)) == [1, 2]
