"""Long-running commands end at SIGINT and SIGTERM, and leave nothing behind.

Each test waits for an event in the command's own process, directory or socket.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import DEADLINE_S, until

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def descendants(pid: int) -> set[int]:
    """Return the processes below a process."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = {int(word) for word in task.read_text().split()}
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children - found:
            found |= {child} | descendants(child)
    return found


def has_vcpu(pid: int) -> bool:
    """Return whether a process has a vCPU of KVM open."""
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if "kvm-vcpu" in str(link.readlink()):
                return True
    except OSError:  # A descriptor was closed meanwhile.
        return False
    return False


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Directory for the temporary files of a command and of its children."""
    folder = tmp_path / "tmp"
    folder.mkdir(mode=0o700)
    return folder


Ended = Callable[..., str]


@pytest.fixture
def ended(place: Path, tmp_path: Path) -> Ended:
    """Run a command, signal it at an event, and check its end; return its standard error."""

    def run(
        words: list[str],
        event: Callable[[int], bool],
        number: signal.Signals,
        env: dict[str, str] | None = None,
    ) -> str:
        given = os.environ | {"TMPDIR": str(place), "KVMHOST_RUNTIME_DIR": str(tmp_path)}
        with subprocess.Popen(
            [sys.executable, "-m", "kvmhost", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=given | (env or {}),
        ) as process:
            try:
                until(
                    lambda: process.poll() is not None or event(process.pid),
                    f"the event of {' '.join(words)}",
                )
                assert process.poll() is None, process.communicate()[1]
                below = descendants(process.pid)
                process.send_signal(number)
                _, errors = process.communicate(timeout=DEADLINE_S)
            finally:
                process.kill()
        assert process.returncode == 128 + number, errors
        assert "Traceback" not in errors
        assert list(place.iterdir()) == []
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), "the children's end")
        return errors

    return run


@pytest.mark.requires_kvm
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "words",
    [
        "accuracy --tracker guestpt --workload random",
        "bench harvest --mem 16M --tracker guestpt",
        "bench sampling --mem 16M",
    ],
)
def test_measurements(words: str, number: signal.Signals, ended: Ended) -> None:
    ended(words.split(), has_vcpu, number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "words",
    [
        "bench young --mem 1G",
        pytest.param("bench snapshot --mem 96M", marks=pytest.mark.requires_kvm),
    ],
)
def test_measurements_with_files(
    words: str, number: signal.Signals, place: Path, ended: Ended
) -> None:
    ended(words.split(), lambda pid: any(place.iterdir()), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_build(number: signal.Signals, tmp_path: Path, ended: Ended) -> None:
    source, marker, compiler = tmp_path / "a.c", tmp_path / "marker", tmp_path / "cc.py"
    source.write_text("int x;")
    compiler.write_text(
        "import pathlib, sys, threading\n"
        f"pathlib.Path({str(marker)!r}).touch()\n"
        "threading.Event().wait()\n"
    )
    env = {"KVMHOST_GUEST_CC": shlex.join([sys.executable, str(compiler)])}
    ended(["guests", "build", str(source)], lambda pid: marker.exists(), number, env)
    assert not source.with_suffix(".elf").exists()


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Callable[[int], bool]]:
    """A VM that accepts connections and answers nothing; return whether one is there."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "silent.sock"))
        server.listen()
        server.setblocking(False)
        accepted: list[socket.socket] = []

        def was_asked(pid: int) -> bool:
            try:
                accepted.append(server.accept()[0])
            except BlockingIOError:
                return False
            return True

        yield was_asked
        for connection in accepted:
            connection.close()


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "words", ["snapshot silent a.snap", "drain silent", "limit silent 1M", "page silent 1"]
)
def test_requests(
    words: str, number: signal.Signals, silent: Callable[[int], bool], tmp_path: Path, ended: Ended
) -> None:
    (tmp_path / "silent.sock").chmod(0o600)
    ended(words.split(), silent, number)
    assert not list(tmp_path.glob("a.snap*"))
