"""One x86-64 processor emulated by Unicorn: the only importer of ``unicorn``.

Unicorn works in its CPU TLB mode here: it walks the guest's own page tables and
sets accessed and dirty bits in them. All hooks are C functions of the core
(``kvmhost/_core/emulated.c``), so that no callback needs the interpreter.

Entry is at privilege level 3. Unicorn's register interface loads selectors but
not the level, so the state is reached as on a processor: an ``iretq`` at level 0,
before paging is enabled, in a page that is mapped temporarily and unmapped before
guest code runs. As under KVM there is no GDT and no IDT afterwards.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from kvmhost._ffi import ffi, lib
from kvmhost.boot.longmode import EntryState
from kvmhost.errors import CapabilityError
from kvmhost.memory.guest import GuestMemory
from kvmhost.units import PAGE_BYTES
from kvmhost.vm.names import Access

try:
    # Its type hints are incomplete: treat all of it as untyped.
    unicorn: Any = import_module("unicorn")
    uc_const: Any = import_module("unicorn.unicorn_const")
    x86: Any = import_module("unicorn.x86_const")
    uclib: Any = import_module("unicorn.unicorn_py3.unicorn").uclib
except (ImportError, AttributeError, OSError) as _error:
    raise CapabilityError(
        "unicorn",
        "the unicorn package, 2.1.3 or newer",
        str(_error),
        "install it (pip install 'unicorn>=2.1.3,<2.2'), or use --engine kvm",
    ) from _error

__all__ = ["UnicornCpu"]

#: Unused: only hooks end a run.
_NO_END = 0
#: A page that neither memory nor the MMIO window of a tiny guest has.
_SCRATCH_GPA = 0xE000_0000

_CODE_SELECTOR, _DATA_SELECTOR = 0x23, 0x1B
#: Null, null, null, data and code of level 3 (Intel SDM vol. 3A, 3.4.5).
_GDT = (0, 0, 0, 0x00CF_F300_0000_FFFF, 0x00AF_FB00_0000_FFFF)
_IRETQ = b"\x48\xcf"
_MSR_EFER = 0xC000_0080

_GENERAL = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "rip", "rflags"]
_SPECIAL = ["cr2", "cr3", "cs"]
_NAMES = [*_GENERAL, *(f"r{i}" for i in range(8, 16)), *_SPECIAL]
_REGISTERS = {name: getattr(x86, f"UC_X86_REG_{name.upper()}") for name in _NAMES}

_PROTECTIONS: dict[Access, int] = {
    "none": uc_const.UC_PROT_NONE,
    "read": uc_const.UC_PROT_READ | uc_const.UC_PROT_EXEC,
    "write": uc_const.UC_PROT_ALL,
}

ReadOutside = Callable[[int, int], int]
WriteOutside = Callable[[int, int, int], None]


class UnicornCpu:
    """A processor over guest memory; for one thread at a time, except :meth:`attend`.

    :ivar core: ``struct kh_emu *``: results of the hooks
    :raises CapabilityError: if Unicorn refuses its set-up
    """

    #: Values of ``core.type``.
    WRITE_OUTSIDE = uc_const.UC_MEM_WRITE_UNMAPPED
    FETCH_OUTSIDE = uc_const.UC_MEM_FETCH_UNMAPPED
    WRITE_PROTECTED = uc_const.UC_MEM_WRITE_PROT

    def __init__(self, memory: GuestMemory, state: EntryState) -> None:
        # SAFETY: owned here; Unicorn's hooks point into it until close().
        self.core = ffi.new("struct kh_emu *")
        stop_address = ctypes.cast(uclib.uc_emu_stop, ctypes.c_void_p).value
        self.core.stop = ffi.cast("kh_emu_stop_fn", stop_address)
        try:
            self._uc: Any = unicorn.Uc(uc_const.UC_ARCH_X86, uc_const.UC_MODE_64)
            self._uc.ctl_set_tlb_mode(uc_const.UC_TLB_CPU)
            for region in memory.regions:
                # SAFETY: the mapping belongs to the region, which outlives every vCPU.
                self._uc.mem_map_ptr(
                    region.gpa, region.n_bytes, uc_const.UC_PROT_ALL, region.guest_address
                )
            self._enter(state)
            # No end address: after a run Unicorn looks up its code, which faults.
            self._uc.ctl_exits_enabled(True)
            self._add_hooks()
        except unicorn.UcError as error:
            raise CapabilityError(
                "unicorn", "a 64-bit x86 machine", str(error), "use --engine kvm"
            ) from error
        self._watched: set[tuple[int, int]] = set()

    def run(self, count: int = 0) -> str:
        """Run from the current rip until a hook stops it; the reason is in ``core``.

        :param count: instructions; 0 for no limit
        :return: Unicorn's error message, or an empty string
        """
        self.core.reason = lib.KH_EMU_NONE
        try:
            self._uc.emu_start(self.read("rip"), _NO_END, count=count)
        except unicorn.UcError as error:
            return str(error)
        return ""

    def step_string(self, address: int) -> str:
        """Run the string port instruction at ``address``, its data in ``core.data``."""
        self.core.stepping, self.core.address = lib.KH_EMU_STEP_RUNS, address
        try:
            return self.run()
        finally:
            self.core.stepping = lib.KH_EMU_STEP_NO

    def step_outside(
        self, pages: Iterable[int], read: ReadOutside, write: WriteOutside
    ) -> tuple[str, Callable[[], None]]:
        """Run one instruction with devices at some pages outside memory.

        :param read: gets gpa and size, returns the value
        :param write: gets gpa, size and value
        :return: Unicorn's error or an empty string, and a function that restores
            the registers
        """
        before = self._uc.context_save()
        mapped = sorted(pages)
        for page in mapped:
            self._map_device(page, read, write)
        # Translated code counts instructions only if it was translated for that.
        self._uc.ctl_flush_tb()
        self.core.stepping, self.core.address = lib.KH_EMU_STEP_RUNS, self.read("rip")
        try:
            error = self.run(count=1)
        finally:
            self.core.stepping = lib.KH_EMU_STEP_NO
            for page in mapped:
                self._uc.mem_unmap(page, PAGE_BYTES)
        return error, lambda: self._uc.context_restore(before)

    def watch(self, starts: Iterable[int], ends: Iterable[int]) -> None:
        """Stop before port instructions at ``starts``, and steps at ``ends``, from now on."""
        ports, after = lib.KH_EMU_HOOK_PORT, lib.KH_EMU_HOOK_AFTER
        wanted = {(ports, at) for at in starts} | {(after, at) for at in ends}
        fresh = wanted - self._watched
        for which, address in fresh:
            self._hook(uc_const.UC_HOOK_CODE, which, address, address)
        if fresh:
            self._watched |= fresh
            # Hooks are part of translated code.
            self._uc.ctl_flush_tb()

    def code(self, address: int, n_bytes: int) -> bytes:
        """Read guest code at a virtual address, up to the first unmapped page."""
        buffer = ctypes.create_string_buffer(n_bytes)
        refused = uclib.uc_vmem_read(
            self._uc._uch,
            ctypes.c_uint64(address),
            ctypes.c_uint32(uc_const.UC_PROT_EXEC),
            buffer,
            ctypes.c_size_t(n_bytes),
        )
        return b"" if refused else buffer.raw

    def flush_tlb(self) -> None:
        """Drop cached translations. Not while it runs."""
        self._uc.ctl(uc_const.UC_CTL_TLB_FLUSH, uc_const.UC_CTL_IO_WRITE)

    def map(self, gpa: int, n_bytes: int, host_address: int) -> None:
        """Map memory of the host, which outlives the processor. Not while it runs."""
        self._uc.mem_map_ptr(gpa, n_bytes, uc_const.UC_PROT_ALL, host_address)

    def unmap(self, gpa: int, n_bytes: int) -> None:
        """Undo :meth:`map`. Not while it runs."""
        self._uc.mem_unmap(gpa, n_bytes)
        self.flush_tlb()

    def protect(self, gpa: int, n_bytes: int, access: Access) -> None:
        """Set what memory permits. Not while it runs."""
        self._uc.mem_protect(gpa, n_bytes, _PROTECTIONS[access])
        self.flush_tlb()

    def attend(self) -> None:
        """Make :meth:`run` return before its next block. Any thread."""
        lib.kh_emu_attend(self.core)

    def read(self, register: str) -> int:
        """Return a register by its kernel name, such as ``rip``."""
        return int(self._uc.reg_read(_REGISTERS[register]))

    def write(self, register: str, value: int) -> None:
        """Set a register."""
        self._uc.reg_write(_REGISTERS[register], value)

    def registers(self) -> dict[str, int]:
        """Return all registers that :meth:`read` knows."""
        return {name: self.read(name) for name in _REGISTERS}

    def close(self) -> None:
        """Free the processor. Idempotent."""
        self._uc = None

    def _enter(self, state: EntryState) -> None:
        uc, page = self._uc, _SCRATCH_GPA
        stub, target, stack = page + 0x100, page + 0x180, page + 0x200
        uc.mem_map(page, PAGE_BYTES)
        uc.mem_write(page, b"".join(entry.to_bytes(8, "little") for entry in _GDT))
        uc.mem_write(stub, _IRETQ)
        frame = (target, _CODE_SELECTOR, state.rflags, state.rsp, _DATA_SELECTOR)
        uc.mem_write(stack, b"".join(word.to_bytes(8, "little") for word in frame))
        uc.reg_write(x86.UC_X86_REG_GDTR, (0, page, 8 * len(_GDT) - 1, 0))
        uc.reg_write(x86.UC_X86_REG_RSP, stack)
        uc.emu_start(stub, target)
        for segment in (x86.UC_X86_REG_DS, x86.UC_X86_REG_ES):
            uc.reg_write(segment, _DATA_SELECTOR)
        uc.reg_write(x86.UC_X86_REG_GDTR, (0, 0, 0, 0))
        uc.mem_unmap(page, PAGE_BYTES)
        uc.msr_write(_MSR_EFER, state.efer)
        # Paging last, as on a processor.
        uc.reg_write(x86.UC_X86_REG_CR4, state.cr4)
        uc.reg_write(x86.UC_X86_REG_CR3, state.cr3)
        uc.reg_write(x86.UC_X86_REG_CR0, state.cr0)
        for name in ("rip", "rsp", "rdi", "rsi"):
            self.write(name, getattr(state, name))

    def _add_hooks(self) -> None:
        insn = uc_const.UC_HOOK_INSN
        self._hook(uc_const.UC_HOOK_BLOCK, lib.KH_EMU_HOOK_BLOCK)
        self._hook(uc_const.UC_HOOK_INTR, lib.KH_EMU_HOOK_INTERRUPT)
        self._hook(uc_const.UC_HOOK_INSN_INVALID, lib.KH_EMU_HOOK_UNDEFINED)
        self._hook(uc_const.UC_HOOK_MEM_UNMAPPED, lib.KH_EMU_HOOK_OUTSIDE)
        self._hook(uc_const.UC_HOOK_MEM_PROT, lib.KH_EMU_HOOK_PROTECTED)
        for which, instruction in (
            (lib.KH_EMU_HOOK_OUT, x86.UC_X86_INS_OUT),
            (lib.KH_EMU_HOOK_IN, x86.UC_X86_INS_IN),
            (lib.KH_EMU_HOOK_SYSCALL, x86.UC_X86_INS_SYSCALL),
            (lib.KH_EMU_HOOK_SYSCALL, x86.UC_X86_INS_SYSENTER),
        ):
            self._hook(insn, which, 1, 0, instruction)

    def _hook(self, kind: int, which: int, begin: int = 1, end: int = 0, *more: int) -> None:
        handle = ctypes.c_size_t()
        # SAFETY: the callback is a function of the C core, its user data self.core;
        # both outlive the Uc, which close() releases first.
        refused = uclib.uc_hook_add(
            self._uc._uch,
            ctypes.byref(handle),
            kind,
            lib.kh_emu_hook(which),
            int(ffi.cast("uintptr_t", self.core)),
            begin,
            end,
            *(ctypes.c_int(value) for value in more),
        )
        if refused:
            raise unicorn.UcError(refused)

    def _map_device(self, page: int, read: ReadOutside, write: WriteOutside) -> None:
        self._uc.mmio_map(
            page,
            PAGE_BYTES,
            lambda uc, offset, size, data: read(page + offset, size),
            None,
            lambda uc, offset, size, value, data: write(page + offset, size, value),
            None,
        )
