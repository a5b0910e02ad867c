"""A VM runs, answers and ends although nobody reads what it prints, on any descriptor."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import until

from kvmhost.control.client import Client
from kvmhost.guests import image_path
from kvmhost.tools.stuck import DeadlineFile

SOON = 120.0
KINDS = ["pipe", "nonblocking pipe", "socket", "terminal", "stopped terminal"]
pytestmark = pytest.mark.requires_kvm


def full_pipe(blocking: bool) -> tuple[int, int]:
    reader, writer = os.pipe()
    fill(writer)
    os.set_blocking(writer, blocking)
    return reader, writer


def fill(fd: int) -> None:
    """Write until nothing more fits; a terminal passes on what it has and takes more."""
    os.set_blocking(fd, False)
    for size in (4096, 1):
        while select.select([], [fd], [], 0.2)[1]:
            try:
                os.write(fd, b"x" * size)
            except BlockingIOError:
                break
    os.set_blocking(fd, True)


@pytest.fixture
def stuck() -> Iterator[Callable[[str], int]]:
    """Return a maker of descriptors that take nothing and whose other end stays open."""
    opened: list[int] = []

    def make(kind: str) -> int:
        if kind.endswith("pipe"):
            ends = full_pipe(blocking=kind == "pipe")
        elif kind == "socket":
            left, right = socket.socketpair()
            ends = left.detach(), right.detach()
            fill(ends[1])
        else:
            ends = pty.openpty()
            if kind == "terminal":
                fill(ends[1])
            else:
                os.write(ends[0], b"\x13")  # Ctrl-S
        opened.extend(ends)
        return ends[1]

    yield make
    for fd in opened:
        os.close(fd)


def start(
    *arguments: str, stdout: int, stderr: int, name: str = "stuck"
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kvmhost", "run", *arguments, "--name", name]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)


@contextlib.contextmanager
def running(process: subprocess.Popen[bytes]) -> Iterator[Client]:
    try:
        deadline = time.monotonic() + SOON
        while True:
            try:
                client = Client("stuck")
                client.state()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        with client:
            yield client
    finally:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(tmp_path))


ENDLESS = ("touch", "--mem", "8M", "--param", "pages=64", "--param", "epochs=0")


@pytest.mark.parametrize("kind", KINDS)
def test_the_guest_ends_and_what_was_lost_is_said(kind: str, stuck: Callable[[str], int]) -> None:
    process = start("hello", stdout=stuck(kind), stderr=subprocess.PIPE)
    _, messages = process.communicate(timeout=SOON)
    assert process.returncode == 1
    text = messages.decode()
    assert "27 bytes of the guest's output could not be written: its reader does not read" in text


@pytest.mark.parametrize("kind", KINDS)
def test_timeout_with_nobody_at_any_output(kind: str, stuck: Callable[[str], int]) -> None:
    fd = stuck(kind)
    process = start(*ENDLESS, "--timeout", "0.5", stdout=fd, stderr=fd)
    try:
        assert process.wait(SOON) == 124
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_signals_and_requests(
    kind: str, number: int, stuck: Callable[[str], int], tmp_path: Path
) -> None:
    fd = stuck(kind)
    process = start("hello", "--paused", stdout=fd, stderr=fd)
    with running(process) as client:
        until(lambda: client.state().paused, "started, and paused")
        client.pause()
        assert client.snapshot(str(tmp_path / "s.snap")) >= 0
        assert client.state().vcpus
        process.send_signal(number)
        assert process.wait(SOON) == 128 + number


def test_a_report_that_nobody_reads_ends(stuck: Callable[[str], int]) -> None:
    process = start("hello", "--json", stdout=stuck("pipe"), stderr=subprocess.PIPE)
    _, messages = process.communicate(timeout=SOON)
    assert process.returncode == 1
    assert b"standard output: its reader does not read" in messages


def test_a_write_that_is_late_fails_the_next_ones_until_it_is_through() -> None:
    reader, writer = full_pipe(blocking=True)
    out = DeadlineFile(writer, 0.1)
    with pytest.raises(TimeoutError):
        out.write(b"late")
    with pytest.raises(TimeoutError):
        out.write(b"lost")
    got = b""
    while not got.endswith(b"late"):
        got += os.read(reader, 1 << 16)
    deadline = time.monotonic() + SOON
    while True:
        with contextlib.suppress(TimeoutError):
            assert out.write(b"again") == 5
            break
        assert time.monotonic() < deadline
    assert os.read(reader, 100) == b"again"
    os.close(reader)
    os.close(writer)


def test_reads_all_that_a_slow_reader_takes() -> None:
    """A reader that is slow, not gone, gets every byte, although the guest is far ahead."""
    reader, writer = os.pipe()
    image = image_path("hello")
    process = subprocess.Popen(
        [sys.executable, "-m", "kvmhost", "run", str(image)],
        stdout=writer,
        stdin=subprocess.DEVNULL,
    )
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        assert stream.read() == b"hello from vCPU 0x0 of 0x1\n"
    assert process.wait(SOON) == 0
