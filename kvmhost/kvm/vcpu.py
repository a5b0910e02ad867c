"""The vCPU descriptor: running until an exit, and what may happen in between.

The state of a vCPU is in :mod:`~kvmhost.kvm.vcpu_state`.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from kvmhost._ffi import check, ffi, lib
from kvmhost.errors import LayoutError, StateError
from kvmhost.kvm.descriptor import Enabling
from kvmhost.kvm.exits import Exit, Kicked, decode
from kvmhost.kvm.structs import Struct
from kvmhost.kvm.vcpu_state import VcpuState
from kvmhost.kvm.xen import VcpuXen

if typing.TYPE_CHECKING:
    from kvmhost.kvm.stats import Stats

__all__ = ["KvmVcpu"]

_EINTR = 4
_MASK_BYTES = 8


class KvmVcpu(VcpuState, VcpuXen, Enabling):
    """One vCPU. :meth:`run` is for one thread at a time, :meth:`kick` for any.

    Owns its descriptor and the mapping of ``struct kvm_run``.
    """

    def __init__(self, fd: int, index: int, run_bytes: int) -> None:
        super().__init__(fd)
        self.index = index
        # SAFETY: owned by this object; C maps kvm_run into it and unmaps in close().
        self.core = ffi.new("struct kh_vcpu *")
        try:
            check(lib.kh_kick_setup(), "sigaction", signal=lib.kh_kick_signal())
            check(lib.kh_vcpu_map(self.core, fd, run_bytes), "mmap", fd=fd, length=run_bytes)
            # SAFETY: unmapped with the last reference: here, or of a view on the run page.
            unmap = functools.partial(_unmap, n_bytes=run_bytes)
            self._page: Any = ffi.gc(self.core.run, unmap)
        except BaseException:
            super().close()
            raise

    def run(self, bus: Any = ffi.NULL) -> Exit:
        """Run until an exit that the C bus does not handle.

        :param bus: ``struct kh_bus *``: ports that the C loop handles
        :return: the exit; :class:`Kicked` after :meth:`kick` or a signal
        :raises IoctlError: if KVM_RUN itself fails
        """
        result = lib.kh_vcpu_run(self.core, bus)
        if result in (lib.KH_RUN_KICKED, -_EINTR):
            return Kicked()
        check(result, "KVM_RUN", vcpu=self.index)
        return decode(self.core.exit)

    def complete_read(self, data: bytes) -> None:
        """Give the value that a pending port or MMIO read returns, little-endian.

        >>> if isinstance(vcpu.run(), IoIn): vcpu.complete_read(b"\\x01")  # doctest: +SKIP
        """
        lib.kh_vcpu_complete_read(self.core, data, len(data))

    def complete_msr(self, value: int = 0, error: bool = False) -> None:
        """Answer a pending MSR access: the value read, or #GP with ``error``.

        >>> if isinstance(vcpu.run(), MsrRead): vcpu.complete_msr(42)  # doctest: +SKIP
        """
        lib.kh_vcpu_complete_msr(self.core, value, int(error))

    def complete_hypercall(self, result: int) -> None:
        """Give what a pending hypercall returns to the guest (in rax, modulo 2**64)."""
        lib.kh_vcpu_complete_hypercall(self.core, result % (1 << 64))

    def kick(self) -> None:
        """Make :meth:`run` return, now or the next time it is called. Any thread."""
        check(lib.kh_vcpu_kick(self.core), "tgkill", vcpu=self.index)

    @property
    def run_page(self) -> Struct:
        """``struct kvm_run`` in place: what the vCPU shares with the kernel.

        Its ``kvm_valid_regs`` asks KVM to store registers there at every exit, as
        :meth:`sync_registers` does; ``s.regs`` holds them.

        :raises StateError: after :meth:`close`
        """
        if self.core.run == ffi.NULL:
            raise StateError(f"vCPU {self.index}")
        return Struct.view("kvm_run", self.core.run, self._page)

    def sync_registers(self, classes: int) -> None:
        """Have registers in :attr:`run_page` after every exit, without further requests.

        What is changed there has to be marked in ``kvm_dirty_regs`` before the next run.

        >>> vcpu.sync_registers(lib.KVM_SYNC_X86_REGS)  # doctest: +SKIP
        >>> vcpu.run(); vcpu.run_page.s.regs.regs.rip  # doctest: +SKIP

        :param classes: ``KVM_SYNC_X86_REGS``, ``_SREGS``, ``_EVENTS``; 0 for none. What
            KVM_CAP_SYNC_REGS lacks makes the next :meth:`run` fail with ``EINVAL``
        """
        self.run_page.kvm_valid_regs = classes

    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt; without local APICs in the kernel.

        >>> vcpu.interrupt(0x20)  # doctest: +SKIP

        Delivered when the guest next allows one: check
        ``run_page.ready_for_interrupt_injection``.

        :raises IoctlError: ``EINVAL`` above 255, ``ENXIO`` where the kernel has the PICs,
            ``EEXIST`` if one is queued and the local APICs are in the kernel

        Source: KVM_INTERRUPT.
        """
        self._make("KVM_INTERRUPT", "kvm_interrupt", irq=vector)

    def nmi(self) -> None:
        """Queue a non-maskable interrupt. Source: KVM_NMI."""
        self._call("KVM_NMI")

    def smi(self) -> None:
        """Queue a system-management interrupt.

        :raises IoctlError: ``ENOTTY`` or ``EINVAL`` without KVM_CAP_X86_SMM

        Source: KVM_SMI.
        """
        self._call("KVM_SMI")

    def set_guest_debug(self, control: int, breakpoints: Sequence[int] = ()) -> None:
        """Choose what ends a run as :class:`~kvmhost.exits.Debug`.

        >>> vcpu.set_guest_debug(lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP)
        ... # doctest: +SKIP

        :param control: ``KVM_GUESTDBG_ENABLE`` with ``_SINGLESTEP``, ``_USE_SW_BP``
            (int3), ``_USE_HW_BP``, ``_BLOCKIRQ``; 0 switches all off
        :param breakpoints: up to four linear addresses, stops at execution (hardware)
        :raises IoctlError: ``EBUSY`` while an exception is queued, ``EINVAL`` for control
            bits that KVM does not have
        :raises LayoutError: for more than four breakpoints

        Source: KVM_SET_GUEST_DEBUG.
        """
        if len(breakpoints) > 4:
            raise LayoutError(f"{len(breakpoints)} hardware breakpoints: at most 4")
        # DR7: enable bits 0, 2, 4, 6; kind 0 (execution) for each.
        enabled = sum(1 << 2 * i for i in range(len(breakpoints)))
        debugregs = [*breakpoints, *[0] * (7 - len(breakpoints)), enabled | 0x400]
        request = Struct("kvm_guest_debug", control=control, arch={"debugreg": debugregs})
        self._pass("KVM_SET_GUEST_DEBUG", request, control=control)

    def single_step(self, on: bool = True) -> None:
        """Stop after every instruction, or stop doing so."""
        step = lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP
        self.set_guest_debug(step if on else 0)

    def set_signal_mask(self, blocked: Iterable[int] | None) -> None:
        """Set which signals are blocked while the vCPU runs guest code.

        >>> vcpu.set_signal_mask({signal.SIGALRM})  # doctest: +SKIP

        :param blocked: signal numbers, 1 to 64; None for the thread's own mask again

        Source: KVM_SET_SIGNAL_MASK.
        """
        if blocked is None:
            self._pass("KVM_SET_SIGNAL_MASK", ffi.NULL)
            return
        bits = sum(1 << (number - 1) for number in set(blocked))
        sigset = list(bits.to_bytes(_MASK_BYTES, "little"))
        self._pass("KVM_SET_SIGNAL_MASK", Struct("kvm_signal_mask", sigset=sigset), blocked=bits)

    def translate(self, address: int) -> int | None:
        """Return the gpa behind a linear address, through the guest's tables; None if unmapped.

        >>> vcpu.translate(0x1000)  # doctest: +SKIP
        4096

        Source: KVM_TRANSLATE.
        """
        answer = self._get("KVM_TRANSLATE", "kvm_translation", linear_address=address)
        return int(answer.physical_address) if answer.valid else None

    def kvmclock_ctrl(self) -> None:
        """Notify a guest that uses kvmclock of a pause, so that its watchdog does not fire.

        >>> vcpu.kvmclock_ctrl()  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` if the guest has not switched kvmclock on

        Source: KVM_KVMCLOCK_CTRL.
        """
        self._call("KVM_KVMCLOCK_CTRL")

    def tpr_access_reporting(self, on: bool) -> None:
        """Exit when the guest accesses the task priority register of its local APIC.

        >>> vcpu.tpr_access_reporting(True); vcpu.run()  # doctest: +SKIP
        TprAccess(rip=4108, is_write=True)

        Source: KVM_TPR_ACCESS_REPORTING, with KVM_CAP_VAPIC.
        """
        self._make("KVM_TPR_ACCESS_REPORTING", "kvm_tpr_access_ctl", enabled=int(on))

    def set_vapic_addr(self, gpa: int) -> None:
        """Name guest memory for a copy of the task priority register; 0 for none.

        >>> vcpu.set_vapic_addr(0x7000)  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` without local APICs in the kernel

        Source: KVM_SET_VAPIC_ADDR.
        """
        self._make("KVM_SET_VAPIC_ADDR", "kvm_vapic_addr", vapic_addr=gpa)

    def setup_mce(self, mcg_cap: int) -> None:
        """Give the vCPU machine-check banks, from the bits of ``System.mce_cap_supported``.

        >>> vcpu.setup_mce(kvm.mce_cap_supported() & ~0xFF | 4)  # 4 banks  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` for capabilities that KVM lacks, or no bank

        Source: KVM_X86_SETUP_MCE.
        """
        # SAFETY: the number lives until the call returns.
        self._pass("KVM_X86_SETUP_MCE", ffi.new("uint64_t *", mcg_cap), mcg_cap=mcg_cap)

    def set_mce(self, bank: int, status: int, addr: int = 0, misc: int = 0, mcg: int = 0) -> None:
        """Report a machine check: into a bank, and as #MC if it is uncorrected.

        >>> vcpu.set_mce(1, 1 << 63 | 0x123, addr=0x4000)  # doctest: +SKIP

        :param status: as in IA32_MCi_STATUS; bit 63 is valid, 61 uncorrected
        :param mcg: as in IA32_MCG_STATUS
        :raises IoctlError: ``EINVAL`` for a bank that the vCPU does not have

        Source: KVM_X86_SET_MCE.
        """
        fields = {"bank": bank, "status": status, "addr": addr, "misc": misc}
        self._make("KVM_X86_SET_MCE", "kvm_x86_mce", mcg_status=mcg, **fields)

    def pre_fault_memory(self, gpa: int, n_bytes: int) -> int:
        """Map guest memory for the guest before it touches it.

        >>> vcpu.pre_fault_memory(0, 2 << 20)  # doctest: +SKIP
        0

        :return: bytes that remain, if a signal interrupted the request
        :raises IoctlError: ``ENOTTY`` or ``EOPNOTSUPP`` where KVM_CAP_PRE_FAULT_MEMORY is
            missing (it needs hardware paging), ``ENOENT`` outside all slots

        Source: KVM_PRE_FAULT_MEMORY.
        """
        request = Struct("kvm_pre_fault_memory", gpa=gpa, size=n_bytes)
        self._pass("KVM_PRE_FAULT_MEMORY", request, gpa=gpa, size=n_bytes)
        return int(request.size)

    def stats(self) -> Stats:
        """Open the vCPU's statistics. Source: KVM_GET_STATS_FD.

        >>> with vcpu.stats() as stats: stats.read()["exits"].value  # doctest: +SKIP
        12

        :raises IoctlError: ``ENOTTY`` without KVM_CAP_BINARY_STATS_FD
        """
        from kvmhost.kvm.stats import Stats

        return Stats(self._call("KVM_GET_STATS_FD"))

    def close(self) -> None:
        """Unmap and close. Idempotent. The vCPU must not be running."""
        self.core.fd, self.core.run, self._page = -1, ffi.NULL, None
        super().close()


def _unmap(page: Any, n_bytes: int) -> None:
    lib.kh_unmap(int(ffi.cast("uintptr_t", page)), n_bytes)
