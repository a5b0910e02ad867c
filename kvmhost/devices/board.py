"""The small devices of a ``pc`` board: reset, power, keyboard controller, test device.

Each device handles its ports; a callback ends the machine. Unless a class states otherwise,
registers that it does not describe read as zero and ignore writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "Keyboard",
    "PciConfig",
    "PowerManagement",
    "Scratch",
    "SmiCommand",
    "Stateless",
    "SystemControl",
    "TestIrqs",
    "TestMemory",
]

_PM_TIMER_HZ = 3_579_545


class Stateless:
    """A device without state."""

    def save(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Ignore the state."""


class PciConfig(Stateless):
    """Ports 0xcf8 to 0xcff: no PCI bus, but the reset register 0xcf9."""

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset, self._control, self._address = reset, 0, 0

    def read(self, offset: int, size: int) -> int:
        """Return the address written last, the reset control, or all ones: no device."""
        if offset == 0 and size == 4:
            return self._address
        if offset == 1 and size == 1:
            return self._control
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Set the address; 0xcf9 resets on a rising bit 2."""
        if offset == 0 and size == 4:
            self._address = value
        elif offset == 1 and size == 1:
            rises = value & 4 and not self._control & 4
            self._control = value & 2
            if rises:
                self._reset()


class Keyboard(Stateless):
    """The keyboard controller, ports 0x60 and 0x64: no keys, but A20 and reset."""

    _OUTPUT_FULL, _SYSTEM, _COMMAND, _UNLOCKED = 1, 4, 8, 0x10

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._command, self._mode, self._answer = 0, 0, -1

    def read(self, offset: int, size: int) -> int:
        """Return the answer of the last command (0x60), or the status (0x64)."""
        if offset == 4:
            waiting = self._OUTPUT_FULL if self._answer >= 0 else 0
            return self._SYSTEM | self._COMMAND | self._UNLOCKED | waiting
        answer, self._answer = max(self._answer, 0), -1
        return answer

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a command (0x64) or its argument (0x60)."""
        if offset == 4:
            self._start(value & 0xFF)
        elif offset == 0:
            command, self._command = self._command, 0
            if command == 0x60:
                self._mode = value & 0xFF
            elif command == 0xD1 and not value & 1:
                self._reset()

    def _start(self, command: int) -> None:
        self._command = command if command in (0x60, 0xD1) else 0
        # Read the mode, test controller and port, read the output port (A20 is open).
        answers = {0x20: self._mode, 0xAA: 0x55, 0xAB: 0, 0xD0: 0x03, 0xC0: 0x80}
        self._answer = answers.get(command, self._answer)
        if command & 0xF0 == 0xF0 and not command & 1:  # Pulse the reset line.
            self._reset()


class SystemControl(Stateless):
    """Port 0x92: A20 is always open; bit 0 resets."""

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset

    def read(self, offset: int, size: int) -> int:
        """Return that A20 is open."""
        return 2

    def write(self, offset: int, size: int, value: int) -> None:
        """Reset on bit 0."""
        if value & 1:
            self._reset()


class PowerManagement:
    """ACPI registers at 0x600: PM1a status and enable, control, timer; see also port 0xb2.

    Writing sleep enable with type 0 (S5) or 2 (S4) to the control register is power-off.
    """

    def __init__(
        self, power_off: Callable[[], None], now_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._power_off, self._now_ns = power_off, now_ns
        # ACPI mode from the start, as firmware without an SMI handler leaves it.
        self._enable, self._control = 0, 1
        self._start_ns = now_ns()

    def read(self, offset: int, size: int) -> int:
        """Return a register; the timer counts 24 bits at 3.579545 MHz."""
        if offset >= 8:
            ticks = (self._now_ns() - self._start_ns) * _PM_TIMER_HZ // 1_000_000_000
            return (ticks & 0xFFFFFF) >> 8 * (offset - 8) & ((1 << 8 * size) - 1)
        registers = self._enable << 16 | self._control << 32
        return registers >> 8 * offset & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """Set enable bits (offset 2) or the control register (offset 4)."""
        if offset == 2:
            self._enable = value & 0xFFFF
        elif offset == 4:
            self._control = self._control & 1 | value & 0x1C00
            if value & 0x2000 and value >> 10 & 7 in (0, 2):
                self._power_off()

    def set_acpi(self, on: bool) -> None:
        """Switch to ACPI mode, as the SMI command does: bit 0 of the control register."""
        self._control = self._control & ~1 | int(on)

    def save(self) -> dict[str, Any]:
        """Return the registers and the timer's count."""
        return {
            "enable": self._enable,
            "control": self._control,
            "timer_ns": self._now_ns() - self._start_ns,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Set them from :meth:`save`."""
        self._enable, self._control = int(state["enable"]), int(state["control"])
        self._start_ns = self._now_ns() - int(state["timer_ns"])


class SmiCommand(Stateless):
    """Port 0xb2: the two commands that the FADT names."""

    def __init__(self, power: PowerManagement, enable: int, disable: int) -> None:
        self._power, self._commands = power, {enable: True, disable: False}

    def read(self, offset: int, size: int) -> int:
        """Return 0: commands complete at once."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Switch ACPI on or off."""
        if value in self._commands:
            self._power.set_acpi(self._commands[value])


class Scratch(Stateless):
    """A port that ignores writes, like 0x80 (a short delay on hardware).

    :param byte: the value that reads return
    """

    def __init__(self, byte: int = 0xFF) -> None:
        self._byte = byte

    def read(self, offset: int, size: int) -> int:
        """Return that byte, repeated to the access size."""
        return int.from_bytes(bytes([self._byte]) * size, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Ignore it."""


class TestMemory:
    """Readable and writable bytes: the test device's echo ports and its memory."""

    def __init__(self, n_bytes: int) -> None:
        self._bytes = bytearray(n_bytes)

    def read(self, offset: int, size: int) -> int:
        """Return bytes, little-endian."""
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Set bytes; data beyond the end is dropped."""
        data = value.to_bytes(size, "little")[: max(0, len(self._bytes) - offset)]
        self._bytes[offset : offset + len(data)] = data

    def save(self) -> dict[str, Any]:
        """Return the bytes, without zeros at the end."""
        return {"bytes": bytes(self._bytes).rstrip(b"\0").hex()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Set them from :meth:`save`."""
        raw = bytes.fromhex(state["bytes"])
        if len(raw) > len(self._bytes):
            raise ValueError(f"{len(raw)} bytes for a device of {len(self._bytes)}")
        self._bytes[:] = raw.ljust(len(self._bytes), b"\0")


class TestIrqs(Stateless):
    """Ports from 0x2000 of the test device: each drives one interrupt line."""

    def __init__(self, set_line: Callable[[int, bool], None]) -> None:
        self._set_line = set_line

    def read(self, offset: int, size: int) -> int:
        """Return 0: the lines cannot be read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Raise the line for anything but 0."""
        self._set_line(offset, value != 0)
