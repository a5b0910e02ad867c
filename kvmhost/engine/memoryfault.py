"""What the guest touched when KVM_RUN failed with EFAULT: gpa, host address, read or write.

KVM describes few such faults in KVM_EXIT_MEMORY_FAULT (since Linux 6.8, and on x86 only those
of private memory). For the rest, the instruction is decoded: of its fetch and of the accesses
of its memory operands, the fault is the one whose host mapping does not permit it. With one
operand and no such mapping, as behind the end of a truncated memfd, it is the operand.
Otherwise the place is not known, and neither is it without capstone.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path

from kvmhost.errors import IoctlError, LayoutError
from kvmhost.exits import MemoryFault
from kvmhost.kvm.vcpu import KvmVcpu
from kvmhost.memory.guest import GuestMemory
from kvmhost.units import PAGE_BYTES, PAGE_SHIFT

__all__ = ["code_at", "located"]

_INSN_BYTES = 15
_EFER_LMA = 1 << 10
_FETCH = "x"


class _Access(typing.NamedTuple):
    """One access of an instruction, inside one page."""

    linear: int
    mode: str  # r, w or x


def located(fault: MemoryFault, core: KvmVcpu, memory: GuestMemory) -> MemoryFault:
    """Return a fault of KVM_RUN with what can be found out; the vCPU must not run."""
    rip = int(core.get_regs().rip)
    found = None
    if fault.gpa is None:
        found = _find(core, memory)
    gpa, is_write = (fault.gpa, fault.is_write) if found is None else found
    hva = None if gpa is None else memory.find_hva(gpa)
    return MemoryFault(gpa, hva, is_write, rip, fault.size, fault.flags)


def code_at(core: KvmVcpu, memory: GuestMemory, linear: int) -> bytes:
    """Read an instruction's bytes through the guest's page tables; nothing if not mapped."""
    try:
        gpa = core.translate(linear)
        if gpa is None:
            return b""
        return bytes(memory[gpa : gpa + min(_INSN_BYTES, PAGE_BYTES - gpa % PAGE_BYTES)])
    except (IoctlError, LayoutError):
        return b""


def _find(core: KvmVcpu, memory: GuestMemory) -> tuple[int, bool] | None:
    """Return gpa and is_write of the access that the host refuses; None if that is not known."""
    accesses = list(_accesses(core, memory))
    permissions = _permissions()
    places = []
    for access in accesses:
        gpa = _translated(core, access.linear)
        hva = None if gpa is None else memory.find_hva(gpa)
        if gpa is None or hva is None:
            continue
        places.append((gpa, access.mode))
        if (access.mode if access.mode == "w" else "r") not in permissions(hva):
            return gpa, access.mode == "w"
    operands = [place for place in places if place[1] != _FETCH]
    if len(operands) == 1:
        return operands[0][0], operands[0][1] == "w"
    return None


def _translated(core: KvmVcpu, linear: int) -> int | None:
    try:
        return core.translate(linear)
    except IoctlError:
        return None


def _permissions() -> typing.Callable[[int], str]:
    """Return a function from a host address to its mapping's permissions, as ``rw-s``."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, modes = line.split(maxsplit=2)[:2]
        start, end = (int(word, 16) for word in where.split("-"))
        ranges.append((start, end, modes))

    def of(address: int) -> str:
        return next((modes for start, end, modes in ranges if start <= address < end), "")

    return of


def _accesses(core: KvmVcpu, memory: GuestMemory) -> Iterator[_Access]:
    """Yield the fetch and the operands' accesses of the instruction at rip."""
    regs, sregs = core.get_regs(), core.get_sregs()
    is_long = bool(sregs.efer & _EFER_LMA and sregs.cs.l)
    bits = 64 if is_long else 32 if sregs.cs.db else 16
    linear = regs.rip + (0 if is_long else sregs.cs.base)
    yield _Access(linear, _FETCH)
    insn = _decoded(code_at(core, memory, linear), regs.rip, bits)
    if insn is None:
        return
    values = regs.to_dict()
    bases = {
        name: getattr(sregs, name).base
        for name in ("cs", "ds", "es", "ss", "fs", "gs")
        if not is_long or name in ("fs", "gs")
    }
    for address, size, mode in _operands(insn, values, bases):
        last_page = (address + max(size, 1) - 1) // PAGE_BYTES
        starts = (
            [address] if last_page == address // PAGE_BYTES else [address, last_page << PAGE_SHIFT]
        )
        yield from (_Access(start, one) for start in starts for one in mode)


def _decoded(code: bytes, address: int, bits: int) -> typing.Any:
    try:
        import capstone
    except ImportError:
        return None
    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    decoder = capstone.Cs(capstone.CS_ARCH_X86, modes[bits])
    decoder.detail = True
    return next(decoder.disasm(code, address, 1), None)


def _operands(
    insn: typing.Any, values: dict[str, int], bases: dict[str, int]
) -> Iterator[tuple[int, int, str]]:
    """Yield linear address, size in bytes and modes of each memory operand, the stack too."""
    import capstone
    from capstone import x86_const

    mask = (1 << 8 * insn.addr_size) - 1
    for operand in insn.operands:
        if operand.type != x86_const.X86_OP_MEM or insn.mnemonic == "lea":
            continue
        place = operand.mem
        address = place.disp
        for register, scale in ((place.base, 1), (place.index, place.scale)):
            if register:
                address += scale * _register(insn, insn.reg_name(register), values)
        segment = insn.reg_name(place.segment) if place.segment else "ds"
        modes = "r" * bool(operand.access & capstone.CS_AC_READ)
        modes += "w" * bool(operand.access & capstone.CS_AC_WRITE)
        yield (address & mask) + bases.get(segment, 0), operand.size, modes
    word = insn.addr_size
    if insn.mnemonic.startswith(("push", "call")):
        yield (values["rsp"] - word & mask) + bases.get("ss", 0), word, "w"
    elif insn.mnemonic.startswith(("pop", "ret")):
        yield values["rsp"] + bases.get("ss", 0), word, "r"


def _register(insn: typing.Any, name: str, values: dict[str, int]) -> int:
    """Return the value of the register of which capstone names the part that is used."""
    if name in ("rip", "eip"):
        return int(insn.address + insn.size)
    whole = name[:-1] if name[1:2].isdigit() and name.endswith("d") else name
    return values.get(whole, values.get("r" + name[-2:], 0))
