"""The bus: maps ports and MMIO ranges to devices, in C or in Python.

The C run loop handles ports that need no decision (serial output, doorbells that
no thread waits for). All other accesses return as exits and are looked up here.
Registration checks for overlaps; the map is fixed once a vCPU has run.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from kvmhost._ffi import ffi, lib
from kvmhost.devices.serial import Serial
from kvmhost.errors import LayoutError
from kvmhost.exits import IoIn, IoOut

__all__ = [
    "DEBUG_EXIT_PORT",
    "DOORBELL_PORT",
    "EXIT_PORT",
    "FREE_PORT",
    "SERIAL_PORT",
    "Bus",
    "BusDevice",
]

SERIAL_PORT = 0x3F8
#: As QEMU's isa-debug-exit: the status is ``(value << 1) | 1``.
DEBUG_EXIT_PORT = 0xF4
#: 32 bits: the epoch that a tiny guest's vCPU has just finished.
DOORBELL_PORT = 0x5A0
#: 32 bits: the exit status of a tiny guest's vCPU.
EXIT_PORT = 0x5A4

#: 32 bits: the gfn of a page with a list of ranges that the guest declares free.
FREE_PORT = 0x5A8

_UART_PORTS = 8


class BusDevice(Protocol):
    """A device in Python; ``offset`` counts from the start of its range."""

    def read(self, offset: int, size: int) -> int:
        """Return what the guest reads."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take what the guest writes."""


@dataclasses.dataclass(frozen=True)
class _Range:
    start: int
    end: int
    handler: BusDevice | None


class Bus:
    """Ports of one VM.

    :ivar core: ``struct kh_bus *`` for the C run loop
    """

    def __init__(self) -> None:
        # SAFETY: owned here; holds pointers to serial ports that self._keep keeps alive.
        self.core = ffi.new("struct kh_bus *")
        self._keep: list[Any] = []
        self._ports: list[_Range] = []
        self._mmio: list[_Range] = []

    def add_serial(self, serial: Serial, port: int = SERIAL_PORT) -> None:
        """Put a serial port on the bus; its transmit side is handled in C."""
        self._claim_port(port, _UART_PORTS, None)
        self._add_core_port(port, _UART_PORTS, lib.KH_PORT_SERIAL, serial)

    def add_doorbell(self, port: int = DOORBELL_PORT) -> None:
        """Count doorbells in C; vCPUs that stop at doorbells still return an exit."""
        self._claim_port(port, 4, None)
        self._add_core_port(port, 4, lib.KH_PORT_DOORBELL, None)

    def add_port(self, port: int, n_ports: int, handler: BusDevice) -> None:
        """Put a Python device on the bus.

        :raises LayoutError: if another device has one of the ports
        """
        self._claim_port(port, n_ports, handler)

    def add_mmio(self, gpa: int, n_bytes: int, handler: BusDevice) -> None:
        """Put a Python device at a gpa range outside all memslots."""
        _claim(self._mmio, "MMIO", gpa, n_bytes, handler)

    def port_handler(self, port: int) -> tuple[BusDevice, int] | None:
        """Return the device at a port and the offset in its range."""
        return _find(self._ports, port)

    def mmio_handler(self, gpa: int) -> tuple[BusDevice, int] | None:
        """Return the device at a gpa and the offset in its range."""
        return _find(self._mmio, gpa)

    def read_port(self, vm_exit: IoIn) -> bytes:
        """Return the value of a guest's read; all ones without a device, as on hardware."""
        found, size = self.port_handler(vm_exit.port), vm_exit.size
        if found is None:
            return b"\xff" * (size * vm_exit.count)
        device, offset = found
        mask = (1 << 8 * size) - 1
        values = (device.read(offset, size) & mask for _ in range(vm_exit.count))
        return b"".join(value.to_bytes(size, "little") for value in values)

    def write_port(self, vm_exit: IoOut) -> None:
        """Pass a guest's write to the device; without a device it is ignored."""
        found, size = self.port_handler(vm_exit.port), vm_exit.size
        if found is None:
            return
        device, offset = found
        for start in range(0, vm_exit.count * size, size):
            one = vm_exit.data[start : start + size]
            device.write(offset, size, int.from_bytes(one, "little"))

    def _claim_port(self, port: int, n_ports: int, handler: BusDevice | None) -> None:
        if not 0 <= port <= 0x10000 - n_ports:
            raise LayoutError(f"ports [{port:#x}, {port + n_ports:#x}) are outside [0, 0x10000)")
        _claim(self._ports, "port", port, n_ports, handler)

    def _add_core_port(self, port: int, n_ports: int, kind: int, serial: Serial | None) -> None:
        if self.core.n_ports == lib.KH_BUS_PORTS:
            raise LayoutError(f"more than {lib.KH_BUS_PORTS} port ranges are handled in C")
        slot = self.core.ports[self.core.n_ports]
        slot.port, slot.n_ports, slot.kind = port, n_ports, kind
        slot.serial = serial.core if serial else ffi.NULL
        self._keep.append(serial)
        self.core.n_ports += 1


def _claim(
    ranges: list[_Range], kind: str, start: int, size: int, handler: BusDevice | None
) -> None:
    for other in ranges:
        if start < other.end and other.start < start + size:
            raise LayoutError(
                f"{kind} range [{start:#x}, {start + size:#x}) overlaps "
                f"[{other.start:#x}, {other.end:#x})"
            )
    ranges.append(_Range(start, start + size, handler))


def _find(ranges: list[_Range], at: int) -> tuple[BusDevice, int] | None:
    for entry in ranges:
        if entry.start <= at < entry.end and entry.handler is not None:
            return entry.handler, at - entry.start
    return None
