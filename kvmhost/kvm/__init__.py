"""Bindings to /dev/kvm: one module per kind of descriptor.

Every call that fails raises :class:`~kvmhost.errors.IoctlError` with the
request's name, errno and arguments. Source of names and layouts:
``include/uapi/linux/kvm.h`` and Documentation/virt/kvm/api.rst, Linux v6.12.
"""

from kvmhost.kvm.caps import Cap
from kvmhost.kvm.ring import DirtyRings
from kvmhost.kvm.system import System
from kvmhost.kvm.vcpu import KvmVcpu
from kvmhost.kvm.vm import Vm

__all__ = ["Cap", "DirtyRings", "KvmVcpu", "System", "Vm"]
