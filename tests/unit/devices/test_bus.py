"""The bus: every port has at most one owner, found with its offset."""

from __future__ import annotations

import pytest

from kvmhost._ffi import lib
from kvmhost.devices.bus import Bus
from kvmhost.devices.serial import Serial
from kvmhost.errors import LayoutError


class Device:
    def read(self, offset: int, size: int) -> int:
        return offset + size

    def write(self, offset: int, size: int, value: int) -> None:
        raise AssertionError((offset, size, value))


def test_port_is_found_with_its_offset() -> None:
    bus, device = Bus(), Device()
    bus.add_port(0x200, 8, device)
    assert bus.port_handler(0x205) == (device, 5)
    assert bus.port_handler(0x1FF) is None
    assert bus.port_handler(0x208) is None


@pytest.mark.parametrize(("port", "n_ports"), [(0x3F8, 1), (0x3F0, 9), (0x3FF, 4), (0x3F0, 64)])
def test_overlap_with_a_port_of_c_is_refused(port: int, n_ports: int) -> None:
    bus = Bus()
    bus.add_serial(Serial())
    with pytest.raises(LayoutError, match="overlaps"):
        bus.add_port(port, n_ports, Device())
    bus.add_port(0x3F0, 8, Device())
    bus.add_port(0x400, 8, Device())


@pytest.mark.parametrize(("port", "n_ports"), [(-1, 1), (0xFFFF, 2), (0x10000, 1)])
def test_ports_outside_the_space_are_refused(port: int, n_ports: int) -> None:
    with pytest.raises(LayoutError, match="outside"):
        Bus().add_port(port, n_ports, Device())


def test_mmio_ranges() -> None:
    bus, device = Bus(), Device()
    bus.add_mmio(0xD000_0000, 4096, device)
    assert bus.mmio_handler(0xD000_0FFF) == (device, 0xFFF)
    assert bus.mmio_handler(0xD000_1000) is None
    with pytest.raises(LayoutError, match="MMIO range"):
        bus.add_mmio(0xD000_0FFF, 1, device)


def test_c_takes_a_limited_number_of_ports() -> None:
    bus = Bus()
    for i in range(lib.KH_BUS_PORTS):
        bus.add_serial(Serial(), 0x1000 + 8 * i)
    with pytest.raises(LayoutError, match="handled in C"):
        bus.add_serial(Serial())


def test_serial_log_is_bounded_and_counts_go_on() -> None:
    serial = Serial(log_bytes=4)
    serial.write(b"abcdef")
    assert serial.text() == "abcd"
    assert (serial.n_bytes, serial.lost_bytes) == (6, 0)
