"""The 16550: registers by the data sheet, and any sequence of accesses."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import threading
import tty
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import DEADLINE_S

from kvmhost._ffi import lib
from kvmhost.devices.serial import Serial
from kvmhost.errors import HostError

KH_SINK_BYTES: int = lib.KH_SINK_BYTES
THR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)


def test_reset_state() -> None:
    serial = Serial()
    assert [serial.read(at) for at in (IER, IIR, LCR, LSR)] == [0, 1, 0, 0x60]
    assert serial.read(MSR) == 0xB0


def test_divisor_latch_hides_data_and_enable() -> None:
    serial = Serial()
    serial.write_register(LCR, 0x83)
    serial.write_register(THR, 0x34)
    serial.write_register(IER, 0x12)
    assert (serial.read(THR), serial.read(IER)) == (0x34, 0x12)
    serial.write_register(LCR, 0x03)
    assert serial.read(IER) == 0
    assert serial.text() == ""


def test_transmit_interrupt_is_told_once() -> None:
    serial = Serial()
    serial.write_register(IER, 2)
    assert serial.read(IIR) == 2
    assert serial.read(IIR) == 1
    serial.write_register(THR, ord("a"))
    assert serial.read(IIR) == 2
    assert serial.text() == "a"


def test_received_bytes_come_in_order_and_ask_by_level() -> None:
    serial = Serial()
    serial.write_register(IIR, 0x47)  # FIFO on, level 4
    serial.write_register(IER, 1)
    serial.receive(b"abc")
    assert serial.read(IIR) == 0xCC
    serial.receive(b"d")
    assert serial.read(IIR) == 0xC4
    assert bytes(serial.read(THR) for _ in range(4)) == b"abcd"
    assert serial.read(LSR) & 1 == 0
    assert serial.read(IIR) == 0xC1


def test_loopback_crosses_modem_lines_and_data() -> None:
    serial = Serial()
    serial.write_register(MCR, 0x1F)
    assert serial.read(MSR) & 0xF0 == 0xF0
    serial.write_register(THR, 7)
    assert serial.read(THR) == 7
    assert serial.text() == ""
    serial.write_register(MCR, 0x10)
    assert serial.read(MSR) == 0x0F  # all gone, each change is told
    assert serial.read(MSR) == 0


def test_a_full_buffer_holds_the_sender_until_the_guest_reads() -> None:
    serial = Serial()
    taken: list[int] = []
    sender = threading.Thread(target=lambda: taken.append(serial.receive(bytes(5000))))
    sender.start()
    n_read = 0
    while sender.is_alive() or serial.read(LSR) & 1:
        n_read += serial.read(LSR) & 1
        serial.read(THR)
    sender.join(DEADLINE_S)
    assert taken == [5000]
    assert n_read >= 5000 - 1  # the last may have been read between the two looks


def test_stopped_input_lets_the_sender_go() -> None:
    serial = Serial()
    taken: list[int] = []
    sender = threading.Thread(target=lambda: taken.append(serial.receive(bytes(5000))))
    sender.start()
    serial.stop_input()
    sender.join(DEADLINE_S)
    assert not sender.is_alive()
    assert taken[0] <= 4096


def test_output_goes_by_the_line_unless_told_otherwise() -> None:
    reader, writer = os.pipe()
    serial = Serial(writer)
    serial.write(b"one\ntw")
    assert os.read(reader, 100) == b"one\n"
    serial.set_unbuffered()
    serial.write(b"o")
    assert os.read(reader, 100) == b"two"
    os.close(reader)
    os.close(writer)


Access = tuple[bool, int, int]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 255)),
            st.binary(min_size=1, max_size=40),
        ),
        max_size=60,
    )
)
def test_any_accesses_keep_the_state_whole(steps: list[Access | bytes]) -> None:
    serial = Serial()
    for step in steps:
        if isinstance(step, bytes):
            assert serial.receive(step) == len(step)
            continue
        is_write, register, value = step
        if is_write:
            serial.write_register(register, value)
        else:
            assert 0 <= serial.read(register) <= 0xFF
    state = serial.save()
    other = Serial()
    other.load(state)
    assert other.save() == state
    for register in (IER, LCR, MCR, SCR, MSR, IIR, LSR, THR):
        assert other.read(register) == serial.read(register)


def full_pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    return reader, writer


def full_pty() -> tuple[int, int]:
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    os.set_blocking(ours, False)
    return theirs, ours


LINE = b"0123456789abcde\n"
FAR_AHEAD = LINE * (4 * KH_SINK_BYTES // len(LINE))


@pytest.mark.parametrize("make", [full_pipe, full_pty])
def test_nobody_waits_for_a_reader_and_what_is_dropped_is_counted(
    make: Callable[[], tuple[int, int]],
) -> None:
    reader, writer = make()
    serial = Serial(writer)
    done = threading.Event()

    def guest() -> None:
        for at in range(0, len(FAR_AHEAD), 4096):
            serial.write(FAR_AHEAD[at : at + 4096])
        done.set()

    threading.Thread(target=guest, daemon=True).start()
    assert done.wait(120), "the guest waits for a reader"
    left = serial.flush(stall_s=0.05, total_s=60)
    assert 0 < left <= KH_SINK_BYTES
    assert serial.n_bytes == len(FAR_AHEAD)
    assert serial.lost_bytes >= len(FAR_AHEAD) - KH_SINK_BYTES - (1 << 16)
    lost = serial.lost_bytes
    serial.close()
    assert serial.lost_bytes == lost + left
    os.close(reader)
    os.close(writer)


def test_a_reader_that_comes_late_gets_the_first_mebibyte() -> None:
    reader, writer = full_pipe()
    serial = Serial(writer)
    serial.write(LINE * 100)
    assert serial.flush(stall_s=0, total_s=0) == 1600
    got = b""
    while not got.endswith(LINE * 100):
        got += os.read(reader, 1 << 16)
    assert set(got.partition(LINE)[0]) == set(b"x")
    assert serial.flush() == 0
    assert serial.lost_bytes == 0
    serial.close()
    os.close(reader)
    os.close(writer)


def test_a_reader_that_is_only_slower_gets_everything() -> None:
    reader, writer = os.pipe()
    serial = Serial(writer)
    got = bytearray()

    def read() -> None:
        while data := os.read(reader, 1 << 14):
            got.extend(data)

    thread = threading.Thread(target=read)
    thread.start()
    for at in range(0, len(FAR_AHEAD), 1 << 16):
        serial.write(FAR_AHEAD[at : at + (1 << 16)])
    serial.flush(stall_s=60, total_s=120)
    serial.close()
    os.close(writer)
    thread.join(120)
    assert (bytes(got) == FAR_AHEAD, serial.lost_bytes) == (True, 0)
    os.close(reader)


def read_to_the_end(fd: int) -> None:
    while os.read(fd, 1 << 16):
        pass


def test_closing_ends_a_write_that_is_stuck() -> None:
    """A terminal takes a part and waits in write() for the rest; a pipe waits in poll()."""
    ours, theirs = pty.openpty()
    serial = Serial(theirs)
    serial.write(b"x" * 100_000)
    assert serial.flush(stall_s=0.05, total_s=60) > 0
    closing = threading.Thread(target=serial.close)
    closing.start()
    closing.join(DEADLINE_S)
    assert not closing.is_alive()
    os.close(theirs)  # the last one: no duplicate is left
    with pytest.raises(OSError, match="Input/output error"):
        read_to_the_end(ours)
    os.close(ours)


def test_what_the_descriptor_refuses_is_counted_with_its_reason() -> None:
    with Path("/dev/full").open("wb") as full:
        serial = Serial(full.fileno())
        serial.write(LINE)
        assert serial.flush() == 0
        assert (serial.lost_bytes, serial.write_error) == (len(LINE), errno.ENOSPC)
        serial.close()


def test_a_descriptor_that_is_not_open() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    with pytest.raises(HostError, match="Bad file descriptor"):
        Serial(writer)
