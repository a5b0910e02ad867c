"""The real-time clock and its CMOS memory (MC146818), ports 0x70 and 0x71.

Registers 0x00 to 0x0d as in the MC146818 data sheet; the memory sizes are where PC
firmware stores them. Register 0x0c reports whether the second changed since its last read;
there is no alarm and no interrupt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from kvmhost.memory.pclayout import PcLayout

__all__ = ["CMOS_PORT", "Clock"]

CMOS_PORT = 0x70

_A_UPDATING, _A_DIVIDER = 0x80, 0x26
_B_24_HOURS, _B_BINARY, _B_SET = 0x02, 0x04, 0x80
_C_UPDATED = 0x10
_D_BATTERY = 0x80
#: The last 244 us before a new second.
_UPDATE_S = 0.000244
_TIME_REGISTERS = {0, 2, 4, 6, 7, 8, 9, 0x32}


class Clock:
    """Offset 0 selects a register, offset 1 is its value.

    :param now: seconds since 1970, UTC
    """

    def __init__(self, layout: PcLayout, n_cpus: int, now: Callable[[], float] = time.time) -> None:
        self._now, self._index = now, 0
        self._seen_second = 0  # Register 0x0c has not been read yet.
        self._cells = bytearray(128)
        self._cells[0x0A], self._cells[0x0B] = _A_DIVIDER, _B_24_HOURS
        self._sizes(layout)
        self._cells[0x5F] = min(n_cpus - 1, 255)

    def _sizes(self, layout: PcLayout) -> None:
        low_kib = layout.low_end // 1024
        above_16m = max(0, low_kib - 16 * 1024) // 64
        high_64k = (layout.mem_bytes - layout.low_end) >> 16
        above_1m = min(low_kib - 1024, 0xFFFF)
        for at, value, n_bytes in (
            (0x15, 640, 2),
            (0x17, above_1m, 2),
            (0x30, above_1m, 2),
            (0x34, min(above_16m, 0xFFFF), 2),
            (0x5B, min(high_64k, 0xFFFFFF), 3),
        ):
            self._cells[at : at + n_bytes] = value.to_bytes(n_bytes, "little")

    def read(self, offset: int, size: int) -> int:
        """Return the selected register; the index itself cannot be read."""
        if offset != 1:
            return 0xFF
        if self._index in _TIME_REGISTERS:
            return self._time(self._index)
        if self._index == 0x0A:
            updating = 1 - self._now() % 1 < _UPDATE_S and not self._cells[0x0B] & _B_SET
            return self._cells[0x0A] & 0x7F | (_A_UPDATING if updating else 0)
        if self._index == 0x0C:
            second, seen = int(self._now()), self._seen_second
            self._seen_second = second
            return _C_UPDATED if second != seen else 0
        return _D_BATTERY if self._index == 0x0D else self._cells[self._index]

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a register, or set it; writes to time and fixed registers are ignored."""
        if offset == 0:
            self._index = value & 0x7F
        elif self._index not in _TIME_REGISTERS | {0x0C, 0x0D}:
            self._cells[self._index] = value & 0xFF

    def save(self) -> dict[str, Any]:
        """Return index and memory."""
        return {"index": self._index, "cells": self._cells.hex()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Set index and memory from :meth:`save`; the time stays the host's."""
        cells = bytes.fromhex(state["cells"])
        if len(cells) != len(self._cells):
            raise ValueError(f"{len(cells)} CMOS cells, need {len(self._cells)}")
        self._index, self._cells = int(state["index"]) & 0x7F, bytearray(cells)

    def _time(self, register: int) -> int:
        now = time.gmtime(self._now())
        value = {
            0: now.tm_sec,
            2: now.tm_min,
            4: now.tm_hour,
            6: (now.tm_wday + 1) % 7 + 1,
            7: now.tm_mday,
            8: now.tm_mon,
            9: now.tm_year % 100,
            0x32: now.tm_year // 100,
        }[register]
        mode = self._cells[0x0B]
        afternoon = 0
        if register == 4 and not mode & _B_24_HOURS:
            afternoon = 0x80 if value >= 12 else 0
            value = value % 12 or 12
        if mode & _B_BINARY and register != 0x32:
            return value | afternoon
        return value // 10 << 4 | value % 10 | afternoon
