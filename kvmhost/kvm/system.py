"""The /dev/kvm descriptor: what this KVM offers, and new VMs."""

from __future__ import annotations

import errno
import os

from kvmhost._ffi import check, ffi, lib
from kvmhost.closing import Closing
from kvmhost.errors import CapabilityError, IoctlError
from kvmhost.kvm.caps import Cap
from kvmhost.kvm.vm import Vm

__all__ = ["API_VERSION", "HIDE_KVM_ENV", "System"]

#: Settled since Linux 2.6.22; KVM_GET_API_VERSION has returned nothing else since.
API_VERSION = 12

#: Set to a non-empty value to make kvmhost act as if there were no /dev/kvm.
HIDE_KVM_ENV = "KVMHOST_HIDE_KVM"

_MAX_CPUID_ENTRIES = 1024


class System(Closing):
    """An open /dev/kvm.

    >>> with System() as kvm:  # doctest: +SKIP
    ...     kvm.check_extension(Cap.NR_VCPUS)
    2

    :raises CapabilityError: if the device is missing, hidden, not permitted or too old
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        if os.environ.get(HIDE_KVM_ENV):
            raise _unavailable(f"hidden by {HIDE_KVM_ENV}", f"unset {HIDE_KVM_ENV}")
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise _unavailable(f"{path}: {error.strerror}", _open_remedy(error)) from error
        version = lib.kh_ioctl_int(self.fd, lib.KVM_GET_API_VERSION, 0)
        if version != API_VERSION:
            self.close()
            raise _unavailable(f"{path}: API version {version}", f"need {API_VERSION}")

    def check_extension(self, cap: Cap) -> int:
        """Return what KVM says of a capability; 0 means that it is missing.

        Source: KVM_CHECK_EXTENSION.
        """
        return check(
            lib.kh_ioctl_int(self.fd, lib.KVM_CHECK_EXTENSION, int(cap)),
            "KVM_CHECK_EXTENSION",
            cap=cap.name,
        )

    def vcpu_run_bytes(self) -> int:
        """Return the size of a vCPU's shared run area, in bytes."""
        return check(
            lib.kh_ioctl_int(self.fd, lib.KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE"
        )

    def supported_cpuid(self) -> bytes:
        """Return ``struct kvm_cpuid2`` with all that KVM can offer, as bytes.

        Source: KVM_GET_SUPPORTED_CPUID.
        """
        entries = 128
        while True:
            buffer = bytearray(8 + 40 * entries)
            buffer[0:4] = entries.to_bytes(4, "little")
            result = lib.kh_ioctl_ptr(self.fd, lib.KVM_GET_SUPPORTED_CPUID, ffi.from_buffer(buffer))
            if result != -errno.E2BIG or entries >= _MAX_CPUID_ENTRIES:
                check(result, "KVM_GET_SUPPORTED_CPUID", nent=entries)
                used = int.from_bytes(buffer[0:4], "little")
                return bytes(buffer[: 8 + 40 * used])
            entries *= 2

    def create_vm(self) -> Vm:
        """Create an empty VM. Source: KVM_CREATE_VM.

        :raises IoctlError: for example ``ENOMEM``
        """
        # A signal in the wrong moment ends the call with EINTR: try again.
        while True:
            result = lib.kh_ioctl_int(self.fd, lib.KVM_CREATE_VM, 0)
            if result != -errno.EINTR:
                break
        return Vm(check(result, "KVM_CREATE_VM", type=0), self.vcpu_run_bytes())

    def close(self) -> None:
        """Close the descriptor; VMs made from it live on. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def probe() -> str | None:
    """Try to create a VM; return why not, or None if it works."""
    try:
        with System() as system:
            system.create_vm().close()
    except (CapabilityError, IoctlError) as error:
        return str(error)
    return None


def _unavailable(found: str, remedy: str) -> CapabilityError:
    return CapabilityError("kvm", "a usable /dev/kvm", found, remedy)


def _open_remedy(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "load kvm_intel or kvm_amd, or use --engine emulated"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "join the group that owns /dev/kvm (often kvm), or use --engine emulated"
    return "see dmesg, or use --engine emulated"
