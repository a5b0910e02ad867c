"""The vCPU descriptor: registers, and running until an exit."""

from __future__ import annotations

import os
from typing import Any

from kvmhost._ffi import check, ffi, lib
from kvmhost.closing import Closing
from kvmhost.kvm.exits import Exit, Kicked, decode

__all__ = ["KvmVcpu"]


class KvmVcpu(Closing):
    """One vCPU. :meth:`run` is for one thread at a time, :meth:`kick` for any.

    Owns its descriptor and the mapping of ``struct kvm_run``.
    """

    def __init__(self, fd: int, index: int, run_bytes: int) -> None:
        self.fd = fd
        self.index = index
        # SAFETY: owned by this object; C maps kvm_run into it and unmaps in close().
        self.core = ffi.new("struct kh_vcpu *")
        check(lib.kh_kick_setup(), "sigaction", signal=lib.kh_kick_signal())
        check(lib.kh_vcpu_map(self.core, fd, run_bytes), "mmap", fd=fd, length=run_bytes)

    def get_regs(self) -> Any:
        """Return ``struct kvm_regs *`` with the general registers.

        Source: KVM_GET_REGS.
        """
        regs = ffi.new("struct kvm_regs *")
        check(lib.kh_ioctl_ptr(self.fd, lib.KVM_GET_REGS, regs), "KVM_GET_REGS", vcpu=self.index)
        return regs

    def set_regs(self, regs: Any) -> None:
        """Set the general registers from ``struct kvm_regs *``.

        Source: KVM_SET_REGS.
        """
        check(lib.kh_ioctl_ptr(self.fd, lib.KVM_SET_REGS, regs), "KVM_SET_REGS", vcpu=self.index)

    def get_sregs(self) -> Any:
        """Return ``struct kvm_sregs *``: segments, tables, control registers.

        Source: KVM_GET_SREGS.
        """
        sregs = ffi.new("struct kvm_sregs *")
        check(lib.kh_ioctl_ptr(self.fd, lib.KVM_GET_SREGS, sregs), "KVM_GET_SREGS", vcpu=self.index)
        return sregs

    def set_sregs(self, sregs: Any) -> None:
        """Set the special registers from ``struct kvm_sregs *``.

        :raises IoctlError: ``EINVAL`` for a state that no processor can be in

        Source: KVM_SET_SREGS.
        """
        check(
            lib.kh_ioctl_ptr(self.fd, lib.KVM_SET_SREGS, sregs),
            "KVM_SET_SREGS",
            vcpu=self.index,
            cr0=sregs.cr0,
            cr3=sregs.cr3,
            cr4=sregs.cr4,
            efer=sregs.efer,
        )

    def set_cpuid(self, cpuid2: bytes) -> None:
        """Set what CPUID tells, as ``struct kvm_cpuid2`` in bytes.

        Source: KVM_SET_CPUID2.
        """
        check(
            lib.kh_ioctl_ptr(self.fd, lib.KVM_SET_CPUID2, ffi.from_buffer(cpuid2)),
            "KVM_SET_CPUID2",
            vcpu=self.index,
        )

    def run(self, bus: Any) -> Exit:
        """Run until an exit that the C bus does not handle.

        :param bus: ``struct kh_bus *``: ports that C answers by itself
        :return: the exit; :class:`Kicked` after :meth:`kick`, or when a signal came
        :raises IoctlError: if KVM_RUN itself fails
        """
        result = lib.kh_vcpu_run(self.core, bus)
        if result == lib.KH_RUN_KICKED or result == -4:  # EINTR
            return Kicked()
        check(result, "KVM_RUN", vcpu=self.index)
        return decode(self.core.exit)

    def complete_read(self, data: bytes) -> None:
        """Give the value that a pending port or MMIO read returns, little-endian."""
        lib.kh_vcpu_complete_read(self.core, data, len(data))

    def kick(self) -> None:
        """Make :meth:`run` return, now or the next time it is called. Any thread."""
        check(lib.kh_vcpu_kick(self.core), "tgkill", vcpu=self.index)

    def close(self) -> None:
        """Unmap and close. Idempotent. The vCPU must not be running."""
        if self.fd >= 0:
            lib.kh_vcpu_unmap(self.core)
            os.close(self.fd)
            self.fd = -1
