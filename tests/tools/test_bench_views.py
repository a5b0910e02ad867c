"""``kvmhost bench views`` in small: what readers take from each other, and what a view costs."""

from __future__ import annotations

import pytest
from json_page import checked

from kvmhost.tools.bench import views

pytestmark = [pytest.mark.requires_kvm, pytest.mark.requires_uffd]


def test_a_daemon_beside_other_readers_finds_what_it_finds_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(views._PARAMS, "pages", 1500)
    monkeypatch.setitem(views._PARAMS, "hot", 400)
    monkeypatch.setattr(views, "_MEM_BYTES", 12 << 20)
    monkeypatch.setattr(views, "_BUDGET", views.Mark(size=views.Bytes(3 << 20)))
    assert views.main(["--rounds", "4", "--json"]) == 0
    (found,) = checked("bench views", capsys.readouterr().out)
    alone, *beside, shared = found["rows"]
    assert alone["mean_young_pages"] >= 400
    for row in beside:
        assert row["mean_young_pages"] == alone["mean_young_pages"], row["daemon"]
        assert row["sweeps"] > alone["sweeps"]
    # The control: with one view the heatmap takes everything before the daemon's pass.
    assert not shared["own_views"]
    assert shared["mean_young_pages"] < 0.1 * alone["mean_young_pages"]
    assert found["view"]["bytes_per_page"] == 1 / 8
    assert found["view"]["coarse_bytes_per_page"] == 1 / 4
