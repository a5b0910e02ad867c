"""The VM descriptor: memory slots and vCPUs."""

from __future__ import annotations

import os
import typing

from kvmhost._ffi import check, ffi, lib
from kvmhost.closing import Closing
from kvmhost.kvm.vcpu import KvmVcpu

if typing.TYPE_CHECKING:
    from kvmhost.kvm.caps import Cap

__all__ = ["Vm"]


class Vm(Closing):
    """A VM, as KVM_CREATE_VM returned it. Owns its descriptor."""

    def __init__(self, fd: int, vcpu_run_bytes: int) -> None:
        self.fd = fd
        self._run_bytes = vcpu_run_bytes

    def check_extension(self, cap: Cap) -> int:
        """Return what KVM says of a capability for this VM; 0 means missing."""
        return check(
            lib.kh_ioctl_int(self.fd, lib.KVM_CHECK_EXTENSION, int(cap)),
            "KVM_CHECK_EXTENSION",
            cap=cap.name,
        )

    def set_memory_region(
        self, slot: int, gpa: int, n_bytes: int, host_address: int, flags: int = 0
    ) -> None:
        """Create, change or (``n_bytes`` 0) delete a memslot.

        :param flags: ``KVM_MEM_LOG_DIRTY_PAGES`` and ``KVM_MEM_READONLY`` bits
        :raises IoctlError: ``EEXIST`` for an overlap, ``EINVAL`` for bad alignment

        Source: KVM_SET_USER_MEMORY_REGION.
        """
        region = ffi.new(
            "struct kvm_userspace_memory_region *",
            {
                "slot": slot,
                "flags": flags,
                "guest_phys_addr": gpa,
                "memory_size": n_bytes,
                "userspace_addr": host_address,
            },
        )
        check(
            lib.kh_ioctl_ptr(self.fd, lib.KVM_SET_USER_MEMORY_REGION, region),
            "KVM_SET_USER_MEMORY_REGION",
            slot=slot,
            flags=flags,
            guest_phys_addr=gpa,
            memory_size=n_bytes,
            userspace_addr=host_address,
        )

    def create_vcpu(self, index: int) -> KvmVcpu:
        """Create vCPU ``index``. Source: KVM_CREATE_VCPU.

        :raises IoctlError: ``EEXIST`` if it exists, ``EINVAL`` above KVM_CAP_MAX_VCPUS
        """
        fd = check(
            lib.kh_ioctl_int(self.fd, lib.KVM_CREATE_VCPU, index), "KVM_CREATE_VCPU", id=index
        )
        return KvmVcpu(fd, index, self._run_bytes)

    def close(self) -> None:
        """Close the descriptor. Idempotent; KVM frees the VM with its last vCPU."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
