"""Accesses outside guest memory, made restartable.

Unicorn can neither suspend an instruction nor supply a value later. So an
instruction that accesses an address outside memory is undone, causes an exit, and
is run again when the exit is completed, until all its accesses are known.
"""

from __future__ import annotations

from kvmhost.exits import MmioRead, MmioWrite
from kvmhost.units import PAGE_BYTES

__all__ = ["Replay"]


class Replay:
    """The known accesses of one instruction outside memory."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}  # bytes read, by gpa
        self._written: set[int] = set()  # gpas whose write was an exit already
        self._asked: tuple[int, int] | None = None
        self._missing: MmioRead | MmioWrite | None = None

    @property
    def pages(self) -> set[int]:
        """Gpas of the pages that the instruction accesses."""
        return {gpa // PAGE_BYTES * PAGE_BYTES for gpa in (*self._known, *self._written)}

    def ask(self, gpa: int, size: int, value: int | None) -> MmioRead | MmioWrite:
        """Return the exit for an access; ``value`` None: a read."""
        if value is None:
            self._asked = gpa, size
            return MmioRead(gpa, size)
        self._written.update(range(gpa, gpa + size))
        mask = (1 << 8 * size) - 1
        return MmioWrite(gpa, (value & mask).to_bytes(size, "little"))

    def answer(self, data: bytes) -> None:
        """Set the result of the pending read."""
        if self._asked is not None:
            gpa, size = self._asked
            self._known.update(enumerate(data[:size].ljust(size, b"\xff"), gpa))
            self._asked = None

    def read(self, gpa: int, size: int) -> int:
        """Return the data of a read, if it is known."""
        wanted = range(gpa, gpa + size)
        if all(at in self._known for at in wanted):
            return int.from_bytes(bytes(self._known[at] for at in wanted), "little")
        if self._missing is None:
            self._missing = self.ask(gpa, size, None)
        return 0

    def write(self, gpa: int, size: int, value: int) -> None:
        """Record a write; the first time, it causes an exit."""
        if self._missing is None and gpa not in self._written:
            self._missing = self.ask(gpa, size, value)

    def take_missing(self) -> MmioRead | MmioWrite | None:
        """Return the exit that the last run caused, if any."""
        missing, self._missing = self._missing, None
        return missing
