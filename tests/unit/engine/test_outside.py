"""Replay: an instruction's accesses outside memory become exits one at a time."""

from __future__ import annotations

from kvmhost.engine.outside import Replay
from kvmhost.exits import MmioRead, MmioWrite


def test_read_is_served_in_parts_after_its_answer() -> None:
    replay = Replay()
    assert replay.ask(0x1000, 8, None) == MmioRead(0x1000, 8)
    replay.answer(bytes(range(8)))
    assert replay.pages == {0x1000}
    assert replay.read(0x1000, 4) == 0x03020100
    assert replay.read(0x1004, 4) == 0x07060504
    assert replay.take_missing() is None


def test_unknown_read_is_asked_for() -> None:
    replay = Replay()
    assert replay.read(0x2000, 4) == 0
    assert replay.take_missing() == MmioRead(0x2000, 4)
    assert replay.take_missing() is None
    replay.answer(b"\x01")  # short: the rest reads as ones
    assert replay.read(0x2000, 4) == 0xFFFFFF01


def test_write_is_an_exit_once() -> None:
    replay = Replay()
    assert replay.ask(0x1000, 4, -1) == MmioWrite(0x1000, b"\xff" * 4)
    replay.write(0x1000, 4, 0xFFFFFFFF)
    assert replay.take_missing() is None
    replay.write(0x1004, 4, 7)
    assert replay.take_missing() == MmioWrite(0x1004, b"\x07\0\0\0")
