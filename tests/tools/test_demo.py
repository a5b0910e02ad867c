"""The demo, small: everything it claims is in its report, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from json_page import checked
from waiting import DEADLINE_S, until

SMALL = ["--mem", "224M", "--hot", "16M", "--epochs", "60", "--json"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "kvmhost", "demo", *words]


def groups_of(pid: int) -> list[Path]:
    """Return the cgroups that a demo has made; their names end in its pid."""
    roots = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
    return [path for root in roots for path in root.rglob(f"kvmhost-demo-{pid}")]


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
@pytest.mark.requires_cgroup
def test_killed_without_the_daemon_and_whole_with_it(tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    # Not below tmp_path: the path of a socket has at most 107 bytes.
    place = Path(tempfile.mkdtemp(prefix="kvmhost-"))
    with subprocess.Popen(
        command(*SMALL, "-o", str(picture)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(place)},
    ) as process:
        try:
            out, errors = process.communicate(timeout=5 * DEADLINE_S)
        finally:
            process.kill()
    assert process.returncode == 0, (out, errors)
    (report,) = checked("demo", out)
    assert report["engine"] == "kvm"
    assert report["limited"]["alone"] == {"status": -9, "oom_kills": 1}
    kept = report["limited"]["managed"]
    assert kept["status"] == 0
    assert kept["oom_kills"] == 0
    assert kept["daemon_status"] == 0
    assert kept["evictions"] > 10_000
    assert kept["peak_resident_bytes"] < report["limited"]["limit_bytes"]
    assert {"guestpt", "pagemap"} <= {row["tracker"] for row in report["trackers"]}
    assert all(row["precision_ratio"] == row["recall_ratio"] == 1.0 for row in report["trackers"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(place.iterdir()) == []
    place.rmdir()
    assert groups_of(process.pid) == []


@pytest.mark.requires_kvm
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    place = tmp_path / "tmp"
    place.mkdir(mode=0o700)
    with subprocess.Popen(
        command(*SMALL, "-o", str(tmp_path / "x.png")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(place)},
    ) as process:
        try:
            # Once a VM of its own runs, which is when there is something to leave behind.
            until(lambda: list(place.glob("*/*.sock")), "a VM of the demo", process=process)
            process.send_signal(number)
            _, errors = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert list(place.iterdir()) == []
    assert groups_of(process.pid) == []


@pytest.mark.requires_kvm
def test_a_daemon_that_ends_at_once_is_told(tmp_path: Path) -> None:
    """The sockets of the VMs have room in a path of 107 bytes, the daemon's has not."""
    with tempfile.TemporaryDirectory(prefix="kvmhost-") as short:
        place = Path(short, "x" * (69 - len(short)))
        place.mkdir(mode=0o700)
        done = subprocess.run(
            command(*SMALL, "-o", str(tmp_path / "x.png")),
            capture_output=True,
            text=True,
            env=os.environ | {"TMPDIR": str(place)},
            timeout=5 * DEADLINE_S,
        )
        assert list(place.iterdir()) == []
    assert done.returncode == 125
    assert "the daemon ended with 2 before a pass: " in done.stderr
    assert "longer than 107 bytes" in done.stderr


def test_too_small_is_refused() -> None:
    done = subprocess.run(
        command("--mem", "64M"), capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 2
    assert "give more memory or a smaller --hot" in done.stderr
