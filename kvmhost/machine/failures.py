"""What is said about an exit that its machine has no answer to."""

from __future__ import annotations

from collections.abc import Mapping

from kvmhost.engine.base import Vcpu
from kvmhost.errors import UnexpectedExit
from kvmhost.exits import Exit, InternalError, MmioRead, MmioWrite, Shutdown

__all__ = ["outside_memory", "registers_line", "unexpected"]

_SHOWN = ("rip", "rsp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rflags", "cr2", "cr3")


def registers_line(registers: Mapping[str, int]) -> str:
    """Return the registers that matter most, on one line."""
    return " ".join(f"{name}={registers[name]:#x}" for name in _SHOWN if name in registers)


def unexpected(vcpu: Vcpu, leaving: Exit) -> UnexpectedExit:
    """Describe an exit that ends a guest against its will."""
    if isinstance(leaving, Shutdown):
        reason = "triple fault: an exception that the guest has no handler for"
    elif isinstance(leaving, InternalError):
        code = leaving.instruction.hex(" ") or "not told"
        reason = f"KVM internal error {leaving.suberror}, instruction bytes: {code}"
    else:
        reason = repr(leaving)
    return UnexpectedExit(vcpu.index, reason, registers_line(vcpu.registers()))


def outside_memory(vcpu: Vcpu, leaving: MmioRead | MmioWrite) -> UnexpectedExit:
    """Describe an access where there is neither memory nor a device."""
    kind = "read" if isinstance(leaving, MmioRead) else "write"
    reason = f"{kind} outside all memory slots, gpa {leaving.gpa:#x}"
    return UnexpectedExit(vcpu.index, reason, registers_line(vcpu.registers()))
