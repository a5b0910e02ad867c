"""``kvmhost bench start``: every figure is there, and says what it says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
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
    result = json.loads(done.stdout)
    assert 0 < result["python_s"] < result["hello_s"]
    assert 0 < result["first_exit_median_s"] <= result["first_exit_p99_s"]
    assert result["hello_guest_bytes"] < result["hello_peak_rss_bytes"]
    assert result["hello_beyond_guest_bytes"] <= 60 << 20
    assert "image_to_qemu" not in result


@pytest.mark.requires_kvm
def test_text() -> None:
    done = bench()
    assert done.returncode == 0, done.stderr
    for words in ("python -c pass", "run hello", "create to first exit", "memory of run hello"):
        assert words in done.stdout
