"""``kvmhost young … --pid`` as a person types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from json_page import checked
from waiting import DEADLINE_S

from kvmhost.reclaim.record.reader import YoungRecord


def kvmhost(*words: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmhost", "young", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, **options)


def test_snapshot_of_a_process(toucher: Callable, tmp_path: Path) -> None:
    victim = toucher(4096)
    victim.tell("w 10 20 100")
    out = tmp_path / "young.npy"
    words = ("--tracker", "present", "--json", "--out", str(out))
    done = kvmhost("snapshot", "--pid", str(victim.pid), *words)
    assert (done.returncode, done.stderr) == (0, "")
    found = checked("young snapshot", done.stdout)[0]
    assert found["n_young"] == 100
    assert found["coarse"] is False
    assert (found["n_resident"], found["not_seen"]) == (None, "touches after the first")
    assert found["memslots"] == [{"slot": 0, "gfn_start": 0, "n_pages": 4096, "n_young": 100}]
    assert np.flatnonzero(np.load(out)).tolist() == list(range(10, 2010, 20))


@pytest.mark.parametrize("word", ["guest-ram", "address"])
def test_snapshot_of_a_window_and_a_named_mapping(toucher: Callable, word: str) -> None:
    victim = toucher(4096)
    victim.tell("w 0 1 4096")
    mapping = hex(victim.address + 4096) if word == "address" else word
    words = ("--mapping", mapping, "--interval", "0.05", "--json")
    done = kvmhost("snapshot", "--pid", str(victim.pid), *words)
    if done.returncode == 126:
        pytest.skip(done.stderr)
    found = checked("young snapshot", done.stdout)[0]
    assert found["tracker"] in ("idle", "pageout")
    assert found["n_young"] == 0, "nobody touched anything in the window"


def test_heatmap_of_a_process(toucher: Callable, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    victim = toucher(1024)
    out = tmp_path / "x.png"
    words = ("-o", str(out), "--interval", "0.02", "--count", "5", "--tracker", "present")
    done = kvmhost("heatmap", "--pid", str(victim.pid), *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}: 5 windows of pid {victim.pid}\n"
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["wss", "ages", "hot", "stat"])
def test_windows_of_a_process_are_recorded_and_analysed(
    toucher: Callable, tmp_path: Path, name: str
) -> None:
    victim = toucher(1024)
    victim.tell("w 0 1 300")
    words = ("--pid", str(victim.pid), "--interval", "0.05", "--count", "4", "--tracker", "present")
    done = kvmhost(name, *words, "--json", env=os.environ | {"TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    if name == "wss":
        assert [row["window"] for row in found["windows"]] == [0, 1, 2, 3]
        assert {row["young_pages"][0] for row in found["windows"]} == {300}
    assert list(tmp_path.iterdir()) == []


def test_record_of_a_process(toucher: Callable, tmp_path: Path) -> None:
    victim = toucher(512)
    victim.tell("w 3 1 100")
    out = tmp_path / "a.young"
    words = ("-o", str(out), "--interval", "0.05", "--count", "3", "--tracker", "present")
    done = kvmhost("record", "--pid", str(victim.pid), *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{out}: 3 windows of pid {victim.pid}")
    with YoungRecord.open(out) as record:
        assert record[0].gfns().tolist() == list(range(3, 103))
        (session,) = record.metadata.sessions
        assert session.facts["image"] == "toucher"
    refused(2, "one of both", "record", "vm", "--pid", str(victim.pid), "-o", str(out))
    refused(2, "one of both", "record", "-o", str(out))
    refused(2, "not to a record", "wss", str(out), "--count", "3")
    refused(2, "one of both", "wss", str(out), "--pid", str(victim.pid))


def test_watch_of_a_process(toucher: Callable, terminal: Callable) -> None:
    """What is not known of a process stands in the head; its end is said."""
    victim = toucher(4096)
    victim.tell("w 0 1 512")
    screen = terminal(132, 30)
    words = [sys.executable, "-m", "kvmhost", "young", "watch", "--pid", str(victim.pid)]
    screen.type(f"{' '.join(words)} --tracker present --interval 0.2; echo ended $?")
    screen.keys("Enter")
    screen.shows("████████")
    lines = screen.shows("own cost")
    assert lines[0].startswith(f" pid {victim.pid}  present (host-process)")
    assert "touches after the first not seen  16.0 MiB, residency unknown" in lines[0]
    victim.end()
    screen.shows("the process has ended")
    screen.keys("q")
    screen.shows("ended 0")


@pytest.mark.requires_qemu
def test_snapshot_of_qemu(qemu) -> None:
    qemu.touch(1)
    words = ("--tracker", "present", "--range", "4096:5888", "--json")
    done = kvmhost("snapshot", "--pid", str(qemu.pid), *words)
    assert (done.returncode, done.stderr) == (0, "")
    found = checked("young snapshot", done.stdout)[0]
    assert found["n_young"] == 256
    assert found["ranges"][0] == [4097, 1]


@pytest.mark.requires_qemu
@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_pictures_of_qemu_say_what_they_do_not_show(qemu, tmp_path: Path, suffix: str) -> None:
    """A memfd of a real QEMU, recorded and drawn in one command."""
    pytest.importorskip("matplotlib")
    qemu.touch(1)
    out = tmp_path / f"x{suffix}"
    words = ("-o", str(out), "--tracker", "present", "--interval", "0.1", "--count", "3")
    done = kvmhost("heatmap", "--pid", str(qemu.pid), *words)
    assert (done.returncode, done.stderr) == (0, "")
    if suffix == ".html":
        text = out.read_text()
        assert "touches after the first are not seen" in text
        assert "residency unknown" in text


@pytest.mark.requires_qemu
def test_the_working_set_of_qemu_is_one_command(qemu) -> None:
    qemu.touch(1)
    words = ("--tracker", "present", "--range", "4096:5888", "--interval", "0.1", "--count", "2")
    done = kvmhost("wss", "--pid", str(qemu.pid), *words, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (found,) = checked("young wss", done.stdout)
    assert [row["young_pages"][0] for row in found["windows"]] == [256, 256]


def refused(code: int, text: str, *words: str) -> None:
    done = kvmhost(*words)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_refused(toucher: Callable) -> None:
    pid = str(toucher(64).pid)
    refused(2, "no such process", "snapshot", "--pid", str(2**22 + 9))
    refused(2, "one of both", "snapshot", "vm", "--pid", pid)
    refused(2, "one of both", "snapshot")
    refused(2, "--mapping goes with --pid", "snapshot", "vm", "--mapping", "x")
    refused(2, "guest-ram", "snapshot", "--pid", pid, "--mapping", "nothing")
    refused(2, "pageout", "snapshot", "--pid", pid, "--tracker", "guestpt")
    refused(2, "memory has gfns [0, 0x40)", "snapshot", "--pid", pid, "--range", "0:65")
    refused(2, "as they are cleared", "snapshot", "--pid", pid, "--clear", "--rearm", "all")
    refused(2, "--pid", "snapshot", "--pid", "x")
    refused(126, "itself can register", "snapshot", "--pid", pid, "--tracker", "written")


def test_a_process_that_ends_meanwhile(toucher: Callable) -> None:
    """Status 1, and a sentence: as for a VM that goes away."""
    victim = toucher(64)
    words = ["snapshot", "--pid", str(victim.pid), "--tracker", "present", "--interval", "2"]
    command = [sys.executable, "-m", "kvmhost", "young", *words]
    done = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    opened = f"/proc/{victim.pid}/pagemap"
    fds = Path(f"/proc/{done.pid}/fd")
    while done.poll() is None and opened not in _targets(fds):
        pass
    victim.end()
    assert "has ended" in done.communicate(timeout=DEADLINE_S)[1]
    assert done.returncode == 1


def _targets(fds: Path) -> set[str]:
    found = set()
    for fd in fds.iterdir():
        try:
            found.add(str(fd.readlink()))
        except OSError:
            continue
    return found
