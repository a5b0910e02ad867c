"""Guest accesses that end in the kernel: ioeventfd, and coalesced writes.

Both avoid the exit to userspace: an ioeventfd turns the access into a count on an
eventfd, coalescing appends writes to a ring that is read when a vCPU exits for another
reason. Neither handles reads.
"""

from __future__ import annotations

from kvmhost._ffi import lib
from kvmhost.kvm.descriptor import Descriptor

__all__ = ["VmEvents"]


class VmEvents(Descriptor):
    """The requests of a VM that catch port and MMIO writes in the kernel."""

    def ioeventfd(
        self,
        eventfd: int,
        address: int,
        n_bytes: int,
        *,
        port: bool = False,
        match: int | None = None,
    ) -> None:
        """Count the guest's writes to an address on an eventfd, without an exit.

        >>> vm.ioeventfd(bell, 0x600, 4, port=True)  # doctest: +SKIP

        :param address: gpa, or port number with ``port``
        :param n_bytes: 1, 2, 4 or 8; 0 for any length (KVM_CAP_IOEVENTFD_ANY_LENGTH)
        :param match: count only writes of this value; needs a length
        :raises IoctlError: ``EEXIST`` if the same access has one, ``EBADF`` for no
            eventfd, ``EINVAL`` for a bad length

        Source: KVM_IOEVENTFD.
        """
        self._ioeventfd(eventfd, address, n_bytes, port, match, 0)

    def remove_ioeventfd(
        self,
        eventfd: int,
        address: int,
        n_bytes: int,
        *,
        port: bool = False,
        match: int | None = None,
    ) -> None:
        """Undo :meth:`ioeventfd` of the same arguments.

        >>> vm.remove_ioeventfd(bell, 0x600, 4, port=True)  # doctest: +SKIP

        :raises IoctlError: ``ENOENT`` if there is none

        Source: KVM_IOEVENTFD with KVM_IOEVENTFD_FLAG_DEASSIGN.
        """
        removal = lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        self._ioeventfd(eventfd, address, n_bytes, port, match, removal)

    def coalesce(self, address: int, n_bytes: int, *, port: bool = False) -> None:
        """Collect the guest's writes to a range in a ring (see :class:`CoalescedRing`).

        >>> vm.coalesce(0xD000_0000, 4096)  # doctest: +SKIP

        :param address: gpa, or port number with ``port`` (KVM_CAP_COALESCED_PIO)
        :raises IoctlError: ``ENOSPC`` or ``EINVAL`` for a range that KVM does not take

        Source: KVM_REGISTER_COALESCED_MMIO.
        """
        fields = {"addr": address, "size": n_bytes, "pio": int(port)}
        self._make("KVM_REGISTER_COALESCED_MMIO", "kvm_coalesced_mmio_zone", **fields)

    def remove_coalesced(self, address: int, n_bytes: int, *, port: bool = False) -> None:
        """Undo :meth:`coalesce`; also of every zone inside the range.

        >>> vm.remove_coalesced(0xD000_0000, 4096)  # doctest: +SKIP

        Source: KVM_UNREGISTER_COALESCED_MMIO.
        """
        fields = {"addr": address, "size": n_bytes, "pio": int(port)}
        self._make("KVM_UNREGISTER_COALESCED_MMIO", "kvm_coalesced_mmio_zone", **fields)

    def _ioeventfd(
        self, eventfd: int, address: int, n_bytes: int, port: bool, match: int | None, flags: int
    ) -> None:
        flags |= lib.KVM_IOEVENTFD_FLAG_PIO if port else 0
        flags |= 0 if match is None else lib.KVM_IOEVENTFD_FLAG_DATAMATCH
        fields = {"fd": eventfd, "addr": address, "len": n_bytes, "flags": flags}
        self._make("KVM_IOEVENTFD", "kvm_ioeventfd", datamatch=match or 0, **fields)
