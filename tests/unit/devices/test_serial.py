"""The 16550: registers by the data sheet, and any sequence of accesses."""

from __future__ import annotations

import os
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhost.devices.serial import Serial

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
    sender.join(10)
    assert taken == [5000]
    assert n_read >= 5000 - 1  # the last may have been read between the two looks


def test_stopped_input_lets_the_sender_go() -> None:
    serial = Serial()
    taken: list[int] = []
    sender = threading.Thread(target=lambda: taken.append(serial.receive(bytes(5000))))
    sender.start()
    serial.stop_input()
    sender.join(10)
    assert not sender.is_alive()
    assert taken[0] <= 4096


def test_output_goes_by_the_line_unless_told_otherwise() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
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
