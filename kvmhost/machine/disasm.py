"""Describes the instruction at which a guest failed, in one line, with a hint.

capstone is imported on demand. Without it, the line has only the bytes.
"""

from __future__ import annotations

__all__ = ["disassemble", "hint"]

#: Remedies by mnemonic prefix. The gaps of KVM's emulator were found by experiment.
_HINTS = (
    (("iretq",), "return from an interrupt to level 0 only"),
    (("iret",), "in 32-bit code end the handler with popf and a far return; iretq works"),
    (("int3", "int "), "call the handler instead of a software interrupt"),
    (("popcnt", "movbe", "crc32", "shlx", "shrx", "sarx", "andn", "xsave", "xrstor", "xgetbv"),
     "compile without -march extensions"),
    (("v",), "compile without AVX (-mgeneral-regs-only)"),
    (("f", "wait"), "compile without x87 code (-mgeneral-regs-only); fninit and fnstcw work"),
    (("p", "mov", "cvt", "add", "mul", "sub", "div"),
     "compile without SSE (-mgeneral-regs-only); plain loads and stores of xmm work"),
    (("rdtscp",), "use rdtsc"),
    (("rdrand", "rdseed"), "in 32-bit code there is none"),
    (("sysenter",), "use a call gate or an interrupt"),
    (("lar", "lsl", "verr", "verw"), "read the descriptor from the table"),
    (("clac", "stac"), "leave SMAP off"),
    (("cmpxchg16b", "lock cmpxchg16b"), "use cmpxchg8b or a lock"),
    (("clwb",), "use clflush"),
    (("invpcid",), "reload CR3"),
    (("monitor", "mwait"), "use hlt"),
    (("rdpru",), "read the MSR"),
)  # fmt: skip
_GENERAL = (
    "this KVM emulates privilege level 0 one instruction at a time and its emulator lacks "
    "this one; on hardware paging, or at level 3, it runs"
)


def disassemble(code: bytes, address: int, bits: int) -> str:
    """Return the first instruction in Intel syntax, or why there is none.

    :param bits: 16, 32 or 64
    """
    try:
        import capstone
    except ImportError:
        return "(install capstone for a disassembly)"
    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    decoder = capstone.Cs(capstone.CS_ARCH_X86, modes[bits])
    for _, _, mnemonic, operands in decoder.disasm_lite(code, address, 1):
        return f"{mnemonic} {operands}".strip()
    return "(no instruction)"


def hint(instruction: str) -> str:
    """Return what to do about an instruction that KVM's emulator lacks."""
    for prefixes, text in _HINTS:
        if instruction.startswith(prefixes):
            return f"{_GENERAL}; {text}"
    return _GENERAL
