"""The descriptor of a device that lives in the kernel."""

from __future__ import annotations

from kvmhost.kvm.descriptor import Attributes

__all__ = ["Device"]


class Device(Attributes):
    """A device, as KVM_CREATE_DEVICE returned it. Owns its descriptor.

    All access is by attributes, whose groups and numbers depend on the device. KVM keeps
    the device until the VM is destroyed.

    >>> vfio.has_attr(lib.KVM_DEV_VFIO_GROUP, lib.KVM_DEV_VFIO_GROUP_ADD)  # doctest: +SKIP
    True
    """

    def __init__(self, fd: int, kind: int) -> None:
        super().__init__(fd)
        self.kind = kind
