"""``kvmhost bench trackers`` measures what it says, on a small guest."""

from __future__ import annotations

import pytest
from json_page import checked

from kvmhost.tools.bench import trackers
from kvmhost.trackers import probe_all


@pytest.mark.requires_uffd
def test_figures_of_every_tracker_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert trackers.main(["--mem", "32M", "--rounds", "2", "--json"]) == 0
    (found,) = checked("bench trackers", capsys.readouterr().out)
    works = {name for name, support in probe_all("auto").items() if support.works}
    assert {row["tracker"] for row in found["memory"]} == works
    assert {row["tracker"] for row in found["speed"]} == works & {"pagemap", "dirty"}
    for row in found["speed"]:
        assert row["harvest_of_bare_ratio"] == pytest.approx(row["harvest_us"] / row["bare_us"])
        assert row["bare_us"] > 0
    for row in found["memory"]:
        assert row["max_bytes"] >= row["held_bytes"] >= 0


def test_bad_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--mem", "x"], ["--rounds", "0"]):
        with pytest.raises(SystemExit) as caught:
            trackers.main(words)
        assert caught.value.code == 2
