"""Bindings to /dev/kvm: one module per kind of descriptor.

::

    System      /dev/kvm                     kvm.system
    ├─ KvmVm    KVM_CREATE_VM                kvm.vm, vm_memory, vm_irq, vm_events, xen
    │  ├─ KvmVcpu      KVM_CREATE_VCPU       kvm.vcpu, vcpu_state, xen
    │  │  ├─ Stats          KVM_GET_STATS_FD kvm.stats
    │  │  └─ CoalescedRing  mmap             kvm.coalesced
    │  ├─ Device       KVM_CREATE_DEVICE     kvm.device
    │  ├─ GuestMemfd   KVM_CREATE_GUEST_MEMFD kvm.guestmemfd
    │  ├─ Stats        KVM_GET_STATS_FD      kvm.stats
    │  └─ DirtyRings   mmap                  kvm.ring

Every call that fails raises :class:`~kvmhost.errors.IoctlError` with the
request's name, errno and arguments. Structures are :class:`~kvmhost.kvm.structs.Struct`,
with the kernel's field names. Which request is where, tested by what, is in
docs/kvm-api.md. Source of names and layouts: ``include/uapi/linux/kvm.h`` and
Documentation/virt/kvm/api.rst, Linux v6.12.
"""

from kvmhost.kvm.caps import Cap
from kvmhost.kvm.ring import DirtyRings
from kvmhost.kvm.structs import Struct
from kvmhost.kvm.system import System
from kvmhost.kvm.vcpu import KvmVcpu
from kvmhost.kvm.vm import KvmVm

__all__ = ["Cap", "DirtyRings", "KvmVcpu", "KvmVm", "Struct", "System"]
