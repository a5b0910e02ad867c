"""``kvmhost bench snapshot``: the figures are there, of a VM that evicts."""

from __future__ import annotations

from pathlib import Path

import pytest
from json_page import checked

from kvmhost.tools.main import main

pytestmark = [pytest.mark.requires_kvm, pytest.mark.requires_uffd]


def test_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["--mem", "96M", "--rounds", "1", "--directory", str(tmp_path)]
    assert main(["bench", "snapshot", *argv, "--json"]) == 0
    (result,) = checked("bench snapshot", capsys.readouterr().out)
    assert result["evicted_bytes"] > 10 << 20
    assert result["fault_ins"] > 0
    used = result["parameters"]["mem_bytes"] - (32 << 20)
    assert used - (1 << 20) < result["file_bytes"] < used + (4 << 20)
    assert 0 < result["cp_s"] <= result["cp_fsync_s"]
    assert result["speed_of_cp_fsync_ratio"] == pytest.approx(
        result["cp_fsync_s"] / result["save_s"]
    )
    assert list(tmp_path.iterdir()) == []


def test_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["--mem", "96M", "--rounds", "1", "--directory", str(tmp_path)]
    assert main(["bench", "snapshot", *argv]) == 0
    assert "relative to cp with fsync" in capsys.readouterr().out
