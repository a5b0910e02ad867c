"""Errors for the exits that end a guest and that its machine does not handle."""

from __future__ import annotations

from collections.abc import Mapping

from kvmhost.engine.base import Vcpu
from kvmhost.engine.memoryfault import code_at
from kvmhost.errors import UnexpectedExit
from kvmhost.exits import Exit, InternalError, MemoryFault, MmioRead, MmioWrite, Shutdown
from kvmhost.kvm.vcpu import KvmVcpu
from kvmhost.machine.disasm import disassemble, hint
from kvmhost.memory.guest import GuestMemory

__all__ = ["internal_error", "outside_memory", "registers_line", "unexpected"]

_SHOWN = ("rip", "rsp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rflags", "cr2", "cr3")
_SUBERRORS = {
    1: "an instruction that KVM cannot emulate",
    2: "an exception while another was delivered",
    3: "an event could not be delivered",
    4: "an exit that KVM does not expect",
}
_EMULATION = 1
#: Where a processor starts after a reset.
_RESET = {"cs": 0xF000, "rip": 0xFFF0}
#: SVM leaves the guest's state undefined after a shutdown (shutdown_interception(), v6.12).
_LOST = "its registers are lost, since KVM on AMD resets a vCPU that shuts down"
_CR0_PE, _EFER_LMA = 1, 1 << 10


def registers_line(registers: Mapping[str, int]) -> str:
    """Return the most useful registers, on one line."""
    return " ".join(f"{name}={registers[name]:#x}" for name in _SHOWN if name in registers)


def unexpected(vcpu: Vcpu, vm_exit: Exit) -> UnexpectedExit:
    """Describe an exit that ends a guest."""
    registers = vcpu.registers()
    if isinstance(vm_exit, Shutdown):
        reason = "triple fault: an exception that the guest has no handler for"
        if _RESET.items() <= registers.items():
            return UnexpectedExit(vcpu.index, reason, _LOST)
    elif isinstance(vm_exit, InternalError):
        code = vm_exit.instruction.hex(" ") or "unknown"
        reason = f"KVM internal error {vm_exit.suberror}, instruction bytes: {code}"
    elif isinstance(vm_exit, MemoryFault):
        reason = _memory_fault(vm_exit)
    else:
        reason = repr(vm_exit)
    return UnexpectedExit(vcpu.index, reason, registers_line(registers))


def outside_memory(vcpu: Vcpu, vm_exit: MmioRead | MmioWrite) -> UnexpectedExit:
    """Describe an access where there is neither memory nor a device."""
    kind = "read" if isinstance(vm_exit, MmioRead) else "write"
    reason = f"{kind} outside all memory slots, gpa {vm_exit.gpa:#x}"
    return UnexpectedExit(vcpu.index, reason, registers_line(vcpu.registers()))


def internal_error(
    index: int, vm_exit: InternalError, core: KvmVcpu, memory: GuestMemory
) -> UnexpectedExit:
    """Describe KVM_EXIT_INTERNAL_ERROR: the reason, the instruction, and a hint."""
    regs, sregs = core.get_regs(), core.get_sregs()
    what = _SUBERRORS.get(vm_exit.suberror, "reason unknown")
    reason = f"KVM internal error, suberror {vm_exit.suberror}: {what}"
    linear = regs.rip + (0 if sregs.efer & _EFER_LMA else sregs.cs.base)
    code = vm_exit.instruction or code_at(core, memory, linear)
    lines = []
    if code:
        bits = 64 if sregs.cs.l and sregs.efer & _EFER_LMA else 32 if sregs.cs.db else 16
        instruction = disassemble(code, regs.rip, bits)
        lines.append(f"  instruction bytes: {code.hex(' ')}")
        lines.append(f"  {sregs.cs.selector:#x}:{regs.rip:#x}: {instruction}")
        if vm_exit.suberror == _EMULATION:
            lines.append(f"  hint: {hint(instruction)}")
    if vm_exit.suberror != _EMULATION and vm_exit.data:
        lines.append(f"  data: {' '.join(f'{word:#x}' for word in vm_exit.data)}")
    mode = "protected" if sregs.cr0 & _CR0_PE else "real"
    shown = {"rip": regs.rip, "rsp": regs.rsp, "rax": regs.rax, "rbx": regs.rbx}
    shown |= {"rcx": regs.rcx, "rdx": regs.rdx, "rflags": regs.rflags, "cr3": sregs.cr3}
    lines.append(f"  {mode} mode, {registers_line(shown)}")
    return UnexpectedExit(index, reason, "\n" + "\n".join(lines))


def _memory_fault(fault: MemoryFault) -> str:
    kind = {True: "write", False: "read", None: "access"}[fault.is_write]
    gpa = "unknown" if fault.gpa is None else f"{fault.gpa:#x}"
    hva = "" if fault.hva is None else f" (host address {fault.hva:#x})"
    return f"memory fault: {kind} of gpa {gpa}{hva}, whose host mapping does not permit it"
