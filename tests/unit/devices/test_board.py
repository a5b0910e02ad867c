"""fw_cfg, clock and the small devices of a board, by their registers."""

from __future__ import annotations

import struct
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhost.devices import board
from kvmhost.devices.clock import Clock
from kvmhost.devices.fwcfg import FwCfg
from kvmhost.errors import LayoutError
from kvmhost.memory.dma import GuestDma
from kvmhost.memory.guest import GuestMemory
from kvmhost.memory.pclayout import PcLayout

MIB = 1 << 20


def item(device: FwCfg, key: int, n_bytes: int) -> bytes:
    device.write(0, 2, key)
    return bytes(device.read(1, 1) for _ in range(n_bytes))


def test_items_end_in_zeros() -> None:
    device = FwCfg({5: b"\x03\0"})
    assert item(device, 0, 6) == b"QEMU\0\0"
    assert item(device, 5, 4) == b"\x03\0\0\0"
    assert item(device, 0x1234, 2) == b"\0\0"


def test_files_are_listed_by_name_and_read_by_key() -> None:
    device = FwCfg({}, {"opt/b": b"bb", "opt/a": b"a"})
    raw = item(device, 0x19, 4 + 2 * 64)
    assert struct.unpack_from(">I", raw) == (2,)
    size, key, _, name = struct.unpack_from(">IHH56s", raw, 4)
    assert (size, name.rstrip(b"\0")) == (1, b"opt/a")
    assert item(device, key, 1) == b"a"
    assert item(device, key + 1, 2) == b"bb"


@pytest.mark.parametrize("name", ["", "x" * 56, "\u00e4", "a\nb"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(LayoutError, match="fw_cfg name"):
        FwCfg({}, {name: b""})


def dma_of(memory: GuestMemory) -> GuestDma:
    return GuestDma(memory, memory.punch)


def dma(device: FwCfg, memory: GuestMemory, control: int, n_bytes: int, gpa: int) -> int:
    memory[0x100:0x110] = struct.pack(">IIQ", control, n_bytes, gpa)
    device.write(4, 4, 0)
    device.write(8, 4, int.from_bytes((0x100).to_bytes(4, "big"), "little"))
    return int(struct.unpack(">I", memory[0x100:0x104])[0])


def test_dma() -> None:
    with GuestMemory.of_size(MIB) as memory:
        device = FwCfg({7: b"0123456789"}, {}, dma_of(memory))
        assert item(device, 1, 1) == b"\x03"
        assert device.read(4, 4) | device.read(8, 4) << 32 == int.from_bytes(b"QEMU CFG", "little")
        assert dma(device, memory, 7 << 16 | 8 | 4, 2, 0) == 0  # select, skip two
        assert dma(device, memory, 2, 4, 0x2000) == 0
        assert bytes(memory[0x2000:0x2006]) == b"2345\0\0"
        assert dma(device, memory, 2, 4, MIB - 2) == 1  # outside memory
        assert dma(device, memory, 16, 4, 0x2000) == 1  # nothing can be written


def test_dma_of_more_than_an_item_has_takes_no_memory() -> None:
    with GuestMemory.of_size(64 * MIB) as memory:
        device = FwCfg({7: b"0123456789"}, {}, dma_of(memory))
        memory[MIB : 62 * MIB] = b"\xff" * (61 * MIB)
        held = memory.resident_bytes()
        tracemalloc.start()
        try:
            assert dma(device, memory, 7 << 16 | 8 | 2, 60 * MIB, MIB + 5) == 0
            assert tracemalloc.get_traced_memory()[1] < MIB
        finally:
            tracemalloc.stop()
        # Before it is read: reading a hole of a memfd fills it.
        assert memory.resident_bytes() < held - 50 * MIB
        assert bytes(memory[MIB : MIB + 16]) == b"\xff" * 5 + b"0123456789\0"
        zeros = bytes(memory[MIB + 16 : 61 * MIB + 5])
        assert zeros.count(0) == len(zeros)
        assert bytes(memory[61 * MIB + 5 : 61 * MIB + 6]) == b"\xff"


def test_zeroing_keeps_what_is_beside_it_and_clears_pinned_pages() -> None:
    with GuestMemory.of_size(MIB) as memory:
        pinned = [(0x8000, 0x1000), (0x3800, 0x1000)]
        guest = GuestDma(memory, lambda gfn, n: memory.punch(gfn, n, pinned), pinned)
        for gpa, n_bytes in ((0x1234, 0xF000), (0x3FFF, 2), (0x2000, 0x1000), (0x10, 0x20), (5, 0)):
            memory[0:0x20000] = b"\xff" * 0x20000
            guest.zero(gpa, n_bytes)
            want = b"\xff" * gpa + bytes(n_bytes) + b"\xff" * (0x20000 - gpa - n_bytes)
            assert bytes(memory[0:0x20000]) == want
        for gpa, n_bytes in ((MIB - 1, 2), (MIB, 1), (-1, 1)):
            with pytest.raises(LayoutError):
                guest.zero(gpa, n_bytes)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.booleans(), st.integers(0, 11), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1)
        ),
        max_size=40,
    ),
    st.binary(min_size=16, max_size=16),
)
def test_any_accesses_to_fw_cfg(steps: list[tuple[bool, int, int, int]], descriptor: bytes) -> None:
    with GuestMemory.of_size(MIB) as memory:
        device = FwCfg({5: b"\1\0"}, {"opt/a": b"abc"}, dma_of(memory))
        memory[0x100:0x110] = descriptor
        for is_write, offset, size, value in steps:
            if is_write:
                device.write(offset, size, value & ((1 << 8 * size) - 1))
            else:
                assert 0 <= device.read(offset, size) < 1 << 8 * size
        state = device.save()
        device.load(state)
        assert device.save() == state


NOON = 1_700_000_000.25  # Tuesday, 14 November 2023, 22:13:20 UTC


def register(clock: Clock, index: int) -> int:
    clock.write(0, 1, index)
    return clock.read(1, 1)


def test_the_clock_tells_the_time_as_status_b_says() -> None:
    clock = Clock(PcLayout(128 * MIB), 2, now=lambda: NOON)
    assert [register(clock, i) for i in (0, 2, 4, 6, 7, 8, 9, 0x32)] == [
        0x20, 0x13, 0x22, 3, 0x14, 0x11, 0x23, 0x20,
    ]  # fmt: skip
    clock.write(0, 1, 0x0B)
    clock.write(1, 1, 0x04)  # binary, 12 hours
    assert (register(clock, 4), register(clock, 0)) == (0x80 | 10, 20)
    assert register(clock, 0x0D) == 0x80


def test_the_clock_says_when_it_updates() -> None:
    now = [NOON]
    clock = Clock(PcLayout(128 * MIB), 1, now=lambda: now[0])
    assert register(clock, 0x0A) == 0x26
    now[0] = 1_700_000_000.9999
    assert register(clock, 0x0A) == 0xA6


def test_the_clock_says_once_that_the_second_changed() -> None:
    now = [NOON]
    clock = Clock(PcLayout(128 * MIB), 1, now=lambda: now[0])
    assert (register(clock, 0x0C), register(clock, 0x0C)) == (0x10, 0)
    now[0] += 1
    assert (register(clock, 0x0C), register(clock, 0x0C)) == (0x10, 0)


@pytest.mark.parametrize(
    ("mem_bytes", "above_1m", "above_16m", "high"),
    [(8 * MIB, 7168, 0, 0), (128 * MIB, 0xFFFF, 0x700, 0), (4096 * MIB, 0xFFFF, 0xBF00, 0x4000)],
)
def test_memory_sizes(mem_bytes: int, above_1m: int, above_16m: int, high: int) -> None:
    clock = Clock(PcLayout(mem_bytes), 1)
    assert register(clock, 0x30) | register(clock, 0x31) << 8 == above_1m
    assert register(clock, 0x34) | register(clock, 0x35) << 8 == above_16m
    assert register(clock, 0x5B) | register(clock, 0x5C) << 8 | register(clock, 0x5D) << 16 == high


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1), st.integers(0, 255)), max_size=60))
def test_any_accesses_to_the_clock(steps: list[tuple[bool, int, int]]) -> None:
    clock = Clock(PcLayout(8 * MIB), 1, now=lambda: NOON)
    for is_write, offset, value in steps:
        if is_write:
            clock.write(offset, 1, value)
        else:
            assert 0 <= clock.read(offset, 1) <= 0xFF
    state = clock.save()
    clock.load(state)
    assert clock.save() == state


class Called:
    """Counts calls."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


def test_reset_control_acts_when_bit_2_rises() -> None:
    reset = Called()
    pci = board.PciConfig(reset)
    pci.write(1, 1, 2)
    assert (reset.times, pci.read(1, 1)) == (0, 2)
    pci.write(1, 1, 6)
    assert reset.times == 1
    pci.write(0, 4, 0x8000_0000)
    assert (pci.read(0, 4), pci.read(4, 4), pci.read(4, 2)) == (0x8000_0000, 0xFFFFFFFF, 0xFFFF)
    assert reset.times == 1


@pytest.mark.parametrize(("port", "value"), [(4, 0xFE), (4, 0xF0)])
def test_keyboard_controller_pulses_reset(port: int, value: int) -> None:
    reset = Called()
    board.Keyboard(reset).write(port, 1, value)
    assert reset.times == 1


def test_keyboard_controller_commands() -> None:
    reset = Called()
    keyboard = board.Keyboard(reset)
    assert keyboard.read(4, 1) == 0x1C
    keyboard.write(4, 1, 0xAA)
    assert keyboard.read(4, 1) & 1
    assert keyboard.read(0, 1) == 0x55
    assert not keyboard.read(4, 1) & 1
    keyboard.write(4, 1, 0xD1)
    keyboard.write(0, 1, 0xDF)
    keyboard.write(4, 1, 0xFF)  # pulses nothing
    assert reset.times == 0
    keyboard.write(4, 1, 0xD1)
    keyboard.write(0, 1, 0xDE)
    assert reset.times == 1


def test_power_management() -> None:
    now = [0]
    off = Called()
    power = board.PowerManagement(off, now_ns=lambda: now[0])
    now[0] = 1_000_000_000
    assert power.read(8, 4) == 3_579_545
    now[0] = 10_000_000_000
    assert power.read(8, 4) == 35_795_450 % (1 << 24)
    power.write(4, 2, 0x2000 | 5 << 10)
    assert off.times == 0
    power.write(4, 2, 0x2000)
    assert off.times == 1
    power.write(4, 2, 0x2000 | 2 << 10)
    assert off.times == 2
    assert power.read(4, 2) & 1  # ACPI mode
    smi = board.SmiCommand(power, 0xF1, 0xF0)
    smi.write(0, 1, 0xF0)
    assert not power.read(4, 2) & 1
    smi.write(0, 1, 0xF1)
    assert power.read(4, 2) & 1


def test_the_timer_goes_on_from_a_snapshot() -> None:
    power = board.PowerManagement(Called(), now_ns=lambda: 5_000_000_000)
    state = power.save() | {"timer_ns": 1_000_000_000}
    power.load(state)
    assert power.read(8, 4) == 3_579_545
    other = board.PowerManagement(Called(), time.monotonic_ns)
    other.load(state)
    assert other.read(8, 4) >= 3_579_545
