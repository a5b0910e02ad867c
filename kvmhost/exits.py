"""Why a vCPU stopped running guest code: typed values, the same for every engine."""

from __future__ import annotations

import typing

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


@typing.dataclass_transform(frozen_default=True)
class Exit:
    """Base of all exits: values with the fields that a subclass annotates.

    They behave like frozen dataclasses, without the code that those compile for every
    class at import, which would delay the start of short guests.
    """

    __match_args__: typing.ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        names = tuple(cls.__annotations__)
        type.__setattr__(cls, "__match_args__", names)  # a type checker holds it for final

    def __init__(self, *values: typing.Any, **named: typing.Any) -> None:
        names = self.__match_args__
        if len(values) == len(names) and not named:
            self.__dict__.update(zip(names, values, strict=True))
            return
        given = dict(zip(names, values, strict=False)) | named
        missing = [name for name in names if name not in given and not hasattr(type(self), name)]
        if missing or len(given) != len(values) + len(named) or not given.keys() <= set(names):
            raise TypeError(f"{type(self).__name__} takes {names}, not {values} {named}")
        self.__dict__.update(
            {name: given.get(name, getattr(type(self), name, None)) for name in names}
        )

    def __setattr__(self, name: str, value: object) -> typing.NoReturn:
        raise AttributeError(f"{type(self).__name__} does not change: {name}")

    def __delattr__(self, name: str) -> typing.NoReturn:
        raise AttributeError(f"{type(self).__name__} does not change: {name}")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({shown})"


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


class IoIn(Exit):
    """The guest reads ``count`` times ``size`` bytes from a port and waits for them."""

    port: int
    size: int
    count: int = 1


class MmioRead(Exit):
    """The guest reads ``size`` bytes at a gpa outside all memslots."""

    gpa: int
    size: int


class MmioWrite(Exit):
    """The guest wrote ``data`` at a gpa outside all memslots."""

    gpa: int
    data: bytes


class Hlt(Exit):
    """The guest halted."""


class Shutdown(Exit):
    """Triple fault: an exception that could not be delivered."""

    detail: str = ""


class Kicked(Exit):
    """Not an exit of the guest: another thread kicked the vCPU."""


class MemoryFault(Exit):
    """The guest touched memory for which the host has no page, or none for this access.

    The mapping behind the memslot was protected, unmapped, or ends before the page. The guest
    is before the instruction: once the mapping is back, running the vCPU repeats the access.
    A field is None where it is not known: KVM describes some faults only, and
    :mod:`kvmhost.engine.memoryfault` finds the rest from the instruction.

    ``hva`` is the host address behind ``gpa``; ``size`` and ``flags``
    (``KVM_MEMORY_EXIT_FLAG_…``) are KVM's own.
    """

    gpa: int | None = None
    hva: int | None = None
    is_write: bool | None = None
    rip: int | None = None
    size: int | None = None
    flags: int = 0


class FailEntry(Exit):
    """The processor refused the guest's state."""

    hardware_reason: int


class InternalError(Exit):
    """An internal error of KVM, for example an instruction that it cannot emulate.

    ``data`` are the words that KVM adds; for suberror 1 with data, the low byte
    of the second is an instruction size and the bytes follow.
    """

    suberror: int
    data: tuple[int, ...] = ()

    @property
    def instruction(self) -> bytes:
        """The instruction bytes that KVM could not emulate, if it reports them."""
        if self.suberror != 1 or len(self.data) < 4:
            return b""
        raw = b"".join(word.to_bytes(8, "little") for word in self.data[1:4])
        return raw[1 : 1 + min(raw[0], 15)]


class Debug(Exit):
    """A single step or a breakpoint.

    ``exception`` is 1 for a step or a hardware breakpoint, 3 for ``int3``; ``dr6`` has
    the cause (bit 14: a step; bits 0 to 3: a breakpoint). ``pc`` is the next instruction,
    and the ``int3`` itself.
    """

    exception: int
    pc: int
    dr6: int
    dr7: int


class Hypercall(Exit):
    """The guest made a hypercall and waits for its result."""

    number: int
    args: tuple[int, ...]
    long_mode: bool


class MsrRead(Exit):
    """The guest reads an MSR that KVM refuses, and waits for the value or #GP.

    ``reason`` is one of ``KVM_MSR_EXIT_REASON_…``: 1 invalid, 2 unknown, 4 filtered.
    """

    index: int
    reason: int


class MsrWrite(Exit):
    """The guest writes an MSR that KVM refuses; ``reason`` as in :class:`MsrRead`."""

    index: int
    value: int
    reason: int


class SystemEvent(Exit):
    """The guest requests shutdown (1) or reset (2), or reports a crash (3)."""

    kind: int
    data: tuple[int, ...] = ()


class IoapicEoi(Exit):
    """The guest ended a level-triggered interrupt of an IOAPIC outside the kernel."""

    vector: int


class IrqWindow(Exit):
    """The guest accepts interrupts now, as requested by ``request_interrupt_window``."""


class SetTpr(Exit):
    """The guest lowered its task priority (local APIC outside the kernel)."""


class TprAccess(Exit):
    """The guest used its task priority register, with reporting enabled."""

    rip: int
    is_write: bool


class BusLock(Exit):
    """The guest locked the bus across cache lines, with reporting enabled."""


class UnknownExit(Exit):
    """An exit reason unknown to this version."""

    reason: int
    detail: int = 0
