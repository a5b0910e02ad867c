"""Why a vCPU stopped running guest code: typed values, the same for every engine."""

from __future__ import annotations

import dataclasses

__all__ = [
    "BusLock",
    "Debug",
    "Exit",
    "FailEntry",
    "Hlt",
    "Hypercall",
    "InternalError",
    "IoIn",
    "IoOut",
    "IoapicEoi",
    "IrqWindow",
    "Kicked",
    "MemoryFault",
    "MmioRead",
    "MmioWrite",
    "MsrRead",
    "MsrWrite",
    "SetTpr",
    "Shutdown",
    "SystemEvent",
    "TprAccess",
    "UnknownExit",
]


@dataclasses.dataclass(frozen=True)
class Exit:
    """Base of all exits."""


@dataclasses.dataclass(frozen=True)
class IoOut(Exit):
    """The guest wrote to a port: ``count`` accesses of ``size`` bytes each.

    ``data`` holds them one after the other, little-endian.
    """

    port: int
    size: int
    data: bytes
    count: int = 1

    @property
    def value(self) -> int:
        """The first access as a number."""
        return int.from_bytes(self.data[: self.size], "little")


@dataclasses.dataclass(frozen=True)
class IoIn(Exit):
    """The guest reads ``count`` times ``size`` bytes from a port and waits for them."""

    port: int
    size: int
    count: int = 1


@dataclasses.dataclass(frozen=True)
class MmioRead(Exit):
    """The guest reads ``size`` bytes at a gpa outside all memslots."""

    gpa: int
    size: int


@dataclasses.dataclass(frozen=True)
class MmioWrite(Exit):
    """The guest wrote ``data`` at a gpa outside all memslots."""

    gpa: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class Hlt(Exit):
    """The guest halted."""


@dataclasses.dataclass(frozen=True)
class Shutdown(Exit):
    """Triple fault: an exception that could not be delivered."""

    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Kicked(Exit):
    """No exit of the guest: someone asked for the vCPU's attention."""


@dataclasses.dataclass(frozen=True)
class MemoryFault(Exit):
    """KVM could not resolve a fault on guest memory."""

    gpa: int
    size: int
    flags: int


@dataclasses.dataclass(frozen=True)
class FailEntry(Exit):
    """The processor refused the guest's state."""

    hardware_reason: int


@dataclasses.dataclass(frozen=True)
class InternalError(Exit):
    """KVM gave up, for example on an instruction that it cannot emulate.

    ``data`` are the words that KVM adds; for suberror 1 with data, the low byte
    of the second is an instruction size and the bytes follow.
    """

    suberror: int
    data: tuple[int, ...] = ()

    @property
    def instruction(self) -> bytes:
        """The instruction bytes that KVM could not emulate, if it told."""
        if self.suberror != 1 or len(self.data) < 4:
            return b""
        raw = b"".join(word.to_bytes(8, "little") for word in self.data[1:4])
        return raw[1 : 1 + min(raw[0], 15)]


@dataclasses.dataclass(frozen=True)
class Debug(Exit):
    """A single step or a breakpoint.

    ``exception`` is 1 for a step or a hardware breakpoint, 3 for ``int3``; ``dr6`` says
    which (bit 14: a step; bits 0 to 3: a breakpoint). ``pc`` is the next instruction,
    and the ``int3`` itself.
    """

    exception: int
    pc: int
    dr6: int
    dr7: int


@dataclasses.dataclass(frozen=True)
class Hypercall(Exit):
    """The guest asks for something by hypercall, and waits for what it returns."""

    number: int
    args: tuple[int, ...]
    long_mode: bool


@dataclasses.dataclass(frozen=True)
class MsrRead(Exit):
    """The guest reads an MSR that KVM refuses, and waits for the value or #GP.

    ``reason`` is one of ``KVM_MSR_EXIT_REASON_…``: 1 invalid, 2 unknown, 4 filtered.
    """

    index: int
    reason: int


@dataclasses.dataclass(frozen=True)
class MsrWrite(Exit):
    """The guest writes an MSR that KVM refuses; ``reason`` as in :class:`MsrRead`."""

    index: int
    value: int
    reason: int


@dataclasses.dataclass(frozen=True)
class SystemEvent(Exit):
    """The guest asks to shut down (1), reset (2), or says that it crashed (3)."""

    kind: int
    data: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class IoapicEoi(Exit):
    """The guest ended a level-triggered interrupt of an IOAPIC outside the kernel."""

    vector: int


@dataclasses.dataclass(frozen=True)
class IrqWindow(Exit):
    """The guest takes interrupts now, as was asked by ``request_interrupt_window``."""


@dataclasses.dataclass(frozen=True)
class SetTpr(Exit):
    """The guest lowered its task priority (local APIC outside the kernel)."""


@dataclasses.dataclass(frozen=True)
class TprAccess(Exit):
    """The guest used its task priority register, and that is to be reported."""

    rip: int
    is_write: bool


@dataclasses.dataclass(frozen=True)
class BusLock(Exit):
    """The guest locked the bus across cache lines, and that is to be reported."""


@dataclasses.dataclass(frozen=True)
class UnknownExit(Exit):
    """A reason that this version does not know."""

    reason: int
    detail: int = 0
