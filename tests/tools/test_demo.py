"""The demo, small: everything it claims is in its report, and nothing is left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import DEADLINE_S

SMALL = ["--mem", "224M", "--hot", "16M", "--epochs", "60", "--json"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "kvmhost", "demo", *words]


def left_behind() -> set[str]:
    roots = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"]
    found = {str(p) for root in roots for p in Path(root).glob("kvmhost-demo-*")}
    return found | {str(p) for p in Path("/tmp").glob("kvmhost-demo-*")}


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
@pytest.mark.requires_cgroup
def test_killed_without_the_daemon_and_whole_with_it(tmp_path: Path) -> None:
    before = left_behind()
    picture = tmp_path / "demo.png"
    done = subprocess.run(
        command(*SMALL, "-o", str(picture)), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    report = json.loads(done.stdout)
    assert report["engine"] == "kvm"
    assert report["limited"]["without"] == {"status": -9, "oom_kills": 1}
    kept = report["limited"]["with"]
    assert kept["status"] == 0
    assert kept["oom_kills"] == 0
    assert kept["daemon_status"] == 0
    assert kept["evictions"] > 10_000
    assert kept["resident_peak_bytes"] < report["limited"]["limit_bytes"]
    assert {"guestpt", "pagemap"} <= {row["tracker"] for row in report["trackers"]}
    assert all(row["precision"] == row["recall"] == 1.0 for row in report["trackers"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert left_behind() == before


@pytest.mark.requires_kvm
def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    before = left_behind()
    with subprocess.Popen(
        command(*SMALL, "-o", str(tmp_path / "x.png")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        # Once its first VM runs, which is when there is something to leave behind.
        deadline = time.monotonic() + DEADLINE_S
        while left_behind() == before:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert left_behind() == before


def test_too_small_is_refused() -> None:
    done = subprocess.run(
        command("--mem", "64M"), capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 2
    assert "give more memory or a smaller --hot" in done.stderr
