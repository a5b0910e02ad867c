"""The userfaultfd of a VM, shared by the pager and the trackers."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence

from kvmhost._ffi import check, ffi, lib
from kvmhost.errors import CapabilityError, StateError
from kvmhost.memory.guest import Region

__all__ = ["PLAIN_USERFAULT_ENV", "Userfault", "probe"]

#: Set: behave as on a kernel without UFFDIO_POISON.
PLAIN_USERFAULT_ENV = "KVMHOST_PLAIN_USERFAULT"


class Userfault:
    """An open userfaultfd that delivers kernel-mode faults too, as KVM's are.

    :raises CapabilityError: if the kernel has none, forbids it, or cannot
        write-protect shared memory (before v5.19)
    """

    def __init__(self) -> None:
        lib.kh_uffd_force_plain(bool(os.environ.get(PLAIN_USERFAULT_ENV)))
        features = ffi.new("uint64_t *")
        fd = lib.kh_uffd_open(features)
        if fd < 0:
            raise _unavailable(-fd)
        self.fd, self.features = fd, int(features[0])
        self._quiet: set[int] = set()
        self._reader = ""
        self._claiming = threading.Lock()

    @property
    def minor_faults(self) -> bool:
        """Whether the kernel delivers minor faults on shared memory (Linux 5.14)."""
        return bool(self.features & lib.KH_UFFD_FEATURE_MINOR)

    def claim(self, reader: str) -> None:
        """Become the only reader of the messages, which also registers the guest mappings.

        A mapping has one userfaultfd and a message one reader: the pager or a
        tracker, never both.

        :raises CapabilityError: if there already is a reader
        """
        self._check_open()
        with self._claiming:
            if self._reader not in ("", reader):
                raise CapabilityError(
                    reader,
                    "the messages of the VM's userfaultfd",
                    f"the {self._reader} reads them",
                    "use another tracker, such as guestpt, on a VM that evicts pages",
                )
            self._reader = reader

    def release(self, reader: str, regions: Sequence[Region] = ()) -> None:
        """Undo :meth:`claim`; the reader has unregistered what it registered. Idempotent.

        :param regions: those whose fault-around is disabled again if it was before
        """
        with self._claiming:
            if self._reader == reader:
                self._reader = ""
                if self.fd < 0:
                    return
                silenced = [region for region in regions if region.guest_address in self._quiet]
                self._quiet.clear()
                for region in silenced:
                    self._silence(region)

    def silence_fault_around(self, region: Region) -> None:
        """Register a region's guest mapping for write-protect faults only.

        No page is protected, so no message arrives. But the kernel no longer maps
        the neighbours of a faulting page, which makes host PTEs exact at 4 KiB.
        While there is a reader this takes effect when it is released.
        Source: uffd_disable_fault_around(), include/linux/userfaultfd_k.h, v6.12.
        """
        with self._claiming:
            self._silence(region)

    def _silence(self, region: Region) -> None:
        self._check_open()
        if region.guest_address in self._quiet:
            return
        if self._reader:
            # Its registration turns fault-around off as well, and would be replaced by
            # this one. release() registers the regions recorded here for write-protection.
            self._quiet.add(region.guest_address)
            return
        check(
            lib.kh_uffd_register(self.fd, region.guest_address, region.n_bytes, lib.KH_UFFD_WP),
            "UFFDIO_REGISTER",
            start=region.guest_address,
            length=region.n_bytes,
        )
        self._quiet.add(region.guest_address)

    def _check_open(self) -> None:
        if self.fd < 0:
            raise StateError("the userfaultfd")

    def close(self) -> None:
        """Close it, which wakes every waiter. Idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


def probe() -> str | None:
    """Open a userfaultfd; return why that fails, or None."""
    try:
        Userfault().close()
    except CapabilityError as error:
        return str(error)
    return None


def _unavailable(number: int) -> CapabilityError:
    found = os.strerror(number)
    if number in (errno.EPERM, errno.EACCES) and lib.kh_uffd_user_mode_only():
        found += "; only faults of user mode are allowed, and KVM's are of kernel mode"
    return CapabilityError(
        "userfaultfd",
        "missing and write-protect faults on shmem",
        found,
        _REMEDIES.get(number, "see dmesg"),
    )


_ACCESS = (
    "give your group /dev/userfaultfd with a udev rule "
    '(KERNEL=="userfaultfd", GROUP="kvm", MODE="0660"), '
    "or set sysctl vm.unprivileged_userfaultfd=1, or run as root"
)
_REMEDIES = {
    errno.EPERM: _ACCESS,
    errno.EACCES: _ACCESS,
    errno.ENOSYS: "use a kernel with CONFIG_USERFAULTFD",
    errno.EOPNOTSUPP: "use Linux 5.19 or newer",
}
