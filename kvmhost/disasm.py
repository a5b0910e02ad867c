"""One line about the instruction at which a guest came to its end, and a hint.

capstone is imported only then. Without it, the bytes have to do.
"""

from __future__ import annotations

__all__ = ["disassemble", "hint"]

#: Mnemonic prefix: what helps. What KVM's emulator lacks was found by running it.
_HINTS = (
    (("iret",), "end the handler with popf and a far return, or enter at level 3"),
    (("int3", "int"), "software interrupts are not emulated in protected mode"),
    (("popcnt", "movbe", "shlx", "shrx", "sarx"), "compile without -march extensions"),
    (("fwait", "wait"), "leave the x87 wait out (fninit, fnstsw)"),
    (("v",), "compile without AVX (-mgeneral-regs-only)"),
    (("clac", "stac"), "leave SMAP off"),
    (("xgetbv", "xrstor", "xsave"), "use fxsave, or leave OSXSAVE off"),
    (("cmpxchg16b", "lock cmpxchg16b"), "use cmpxchg8b or a lock"),
    (("clwb",), "use clflush"),
    (("invpcid",), "reload CR3"),
    (("rdpru",), "read the MSR"),
)
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
