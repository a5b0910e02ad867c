"""``kvmhost bench start``: every figure is there, and says what it says."""

from __future__ import annotations

import subprocess
import sys

import pytest
from json_page import checked
from waiting import DEADLINE_S


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "kvmhost.tools.main",
        "bench",
        "start",
        "--rounds",
        "1",
        *words,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)


@pytest.mark.requires_kvm
def test_figures() -> None:
    done = bench("--json")
    assert done.returncode == 0, done.stderr
    (result,) = checked("bench start", done.stdout)
    times = {row["process"]: row["median_s"] for row in result["processes"]}
    assert set(times) == {"python", "hello", "image"}
    assert 0 < times["python"] < times["hello"]
    assert result["image_beyond_python_s"] == times["image"] - times["python"]
    assert 0 < result["first_exit_s"] <= result["p99_first_exit_s"]
    assert result["hello_guest_bytes"] < result["hello_peak_rss_bytes"]
    assert result["hello_beyond_guest_bytes"] <= 60 << 20
    assert result["image_of_qemu_ratio"] is None


@pytest.mark.requires_kvm
def test_text() -> None:
    done = bench()
    assert done.returncode == 0, done.stderr
    for words in ("python -c pass", "run hello", "create to first exit", "memory of run hello"):
        assert words in done.stdout
