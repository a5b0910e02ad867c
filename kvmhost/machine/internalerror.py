"""What is said about a guest that came to an end which it did not choose."""

from __future__ import annotations

from kvmhost.errors import IoctlError, LayoutError, UnexpectedExit
from kvmhost.exits import InternalError
from kvmhost.kvm import KvmVcpu
from kvmhost.machine.disasm import disassemble, hint
from kvmhost.machine.failures import registers_line
from kvmhost.memory.guest import GuestMemory

__all__ = ["internal_error"]

_SUBERRORS = {
    1: "an instruction that KVM cannot emulate",
    2: "an exception while another was delivered",
    3: "an event could not be delivered",
    4: "an exit that KVM does not expect",
}
_EMULATION = 1
_CR0_PE, _EFER_LMA = 1, 1 << 10


def internal_error(
    index: int, leaving: InternalError, core: KvmVcpu, memory: GuestMemory
) -> UnexpectedExit:
    """Describe KVM_EXIT_INTERNAL_ERROR: what, at which instruction, and what helps."""
    regs, sregs = core.get_regs(), core.get_sregs()
    what = _SUBERRORS.get(leaving.suberror, "reason unknown")
    reason = f"KVM internal error, suberror {leaving.suberror}: {what}"
    linear = regs.rip + (0 if sregs.efer & _EFER_LMA else sregs.cs.base)
    code = leaving.instruction or _code_at(core, memory, linear)
    lines = []
    if code:
        bits = 64 if sregs.cs.l and sregs.efer & _EFER_LMA else 32 if sregs.cs.db else 16
        instruction = disassemble(code, regs.rip, bits)
        lines.append(f"  instruction bytes: {code.hex(' ')}")
        lines.append(f"  {sregs.cs.selector:#x}:{regs.rip:#x}: {instruction}")
        if leaving.suberror == _EMULATION:
            lines.append(f"  hint: {hint(instruction)}")
    if leaving.suberror != _EMULATION and leaving.data:
        lines.append(f"  data: {' '.join(f'{word:#x}' for word in leaving.data)}")
    mode = "protected" if sregs.cr0 & _CR0_PE else "real"
    shown = {"rip": regs.rip, "rsp": regs.rsp, "rax": regs.rax, "rbx": regs.rbx}
    shown |= {"rcx": regs.rcx, "rdx": regs.rdx, "rflags": regs.rflags, "cr3": sregs.cr3}
    lines.append(f"  {mode} mode, {registers_line(shown)}")
    return UnexpectedExit(index, reason, "\n" + "\n".join(lines))


def _code_at(core: KvmVcpu, memory: GuestMemory, linear: int) -> bytes:
    """Read instruction bytes through the guest's page tables; nothing if not mapped."""
    try:
        gpa = core.translate(linear)
        if gpa is None:
            return b""
        return bytes(memory[gpa : gpa + min(15, 4096 - gpa % 4096)])
    except (IoctlError, LayoutError):
        return b""
