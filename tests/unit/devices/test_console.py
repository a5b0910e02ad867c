"""Consoles: escape key, files, pseudo-terminals."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import DEADLINE_S

from kvmhost.devices.console import open_console, unescape
from kvmhost.devices.serial import Serial
from kvmhost.errors import LayoutError


@pytest.mark.parametrize(
    ("data", "escaped", "wanted"),
    [
        (b"abc", False, (b"abc", False, False)),
        (b"a\x01", False, (b"a", True, False)),
        (b"x", True, (b"", False, True)),
        (b"a\x01xb", False, (b"a", False, True)),
        (b"\x01\x01x", False, (b"\x01x", False, False)),
        (b"\x01c", False, (b"c", False, False)),
    ],
)
def test_escape_key(data: bytes, escaped: bool, wanted: tuple[bytes, bool, bool]) -> None:
    assert unescape(data, escaped) == wanted


def test_file(tmp_path: Path) -> None:
    with open_console(f"file:{tmp_path / 'out'}") as console:
        serial = Serial(console.fd)
        serial.write(b"to the file\n")
        serial.flush()
        console.feed(serial, lambda: None)
    assert (tmp_path / "out").read_bytes() == b"to the file\n"


@pytest.mark.parametrize("word", ["file:/nonexistent/x", "telnet", "file"])
def test_what_cannot_be_opened(word: str) -> None:
    with pytest.raises(LayoutError, match="--serial"):
        open_console(word)


def test_null_takes_nothing() -> None:
    with open_console("null") as console:
        assert console.fd == -1


@pytest.mark.requires_kvm
def test_a_terminal_is_raw_until_the_escape_key(pc_guest: Callable[[str], Path]) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    command = [sys.executable, "-m", "kvmhost", "run", str(pc_guest("echo.elf"))]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        try:
            assert read_until(ours, b"ready") == b"ready"
            os.write(ours, b"abc\n")  # raw: no echo, no line editing
            assert read_until(ours, b"got abc").strip() == b"got abc"
            os.write(ours, b"\x01x")
            assert process.wait(DEADLINE_S) == 130
        finally:
            process.kill()
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def read_until(fd: int, wanted: bytes) -> bytes:
    got = b""
    deadline = time.monotonic() + DEADLINE_S
    while wanted not in got:
        assert time.monotonic() < deadline, got
        if select.select([fd], [], [], 1)[0]:
            got += os.read(fd, 100)
    return got.strip()


def test_pty_both_ways() -> None:
    with open_console("pty") as console:
        serial = Serial(console.fd)
        console.feed(serial, lambda: None)
        peer = os.open(console.name, os.O_RDWR | os.O_NOCTTY)
        try:
            serial.write(b"out\n")
            assert read_until(peer, b"out\n") == b"out"
            os.write(peer, b"in")
            deadline = time.monotonic() + DEADLINE_S
            got = b""
            while got != b"in":
                assert time.monotonic() < deadline
                if serial.read(5) & 1:
                    got += bytes([serial.read(0)])
        finally:
            os.close(peer)
