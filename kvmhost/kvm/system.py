"""The /dev/kvm descriptor: what this KVM offers, and new VMs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from kvmhost._ffi import check, ffi, lib
from kvmhost.errors import CapabilityError, IoctlError
from kvmhost.kvm.descriptor import Attributes, Capabilities
from kvmhost.kvm.structs import Struct
from kvmhost.kvm.vcpu_state import msr_table
from kvmhost.kvm.vm import KvmVm

__all__ = ["API_VERSION", "HIDE_KVM_ENV", "System"]

#: Stable since Linux 2.6.22; KVM_GET_API_VERSION has returned the same value since.
API_VERSION = 12

#: Set to a non-empty value to make kvmhost act as if there were no /dev/kvm.
HIDE_KVM_ENV = "KVMHOST_HIDE_KVM"


class System(Attributes, Capabilities):
    """An open /dev/kvm. VMs made from it live on when it is closed.

    >>> with System() as kvm:  # doctest: +SKIP
    ...     kvm.check_extension(Cap.NR_VCPUS)
    2

    :raises CapabilityError: if the device is missing, hidden, not permitted or too old
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        if os.environ.get(HIDE_KVM_ENV):
            raise _unavailable(f"hidden by {HIDE_KVM_ENV}", f"unset {HIDE_KVM_ENV}")
        try:
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise _unavailable(f"{path}: {error.strerror}", _open_remedy(error)) from error
        version = lib.kh_ioctl_int(self.fd, lib.KVM_GET_API_VERSION, 0)
        if version != API_VERSION:
            self.close()
            found = os.strerror(-version) if version < 0 else f"API version {version}"
            raise _unavailable(f"{path}: {found}", f"need API version {API_VERSION}")

    def get_api_version(self) -> int:
        """Return the version of the interface: 12.

        >>> kvm.get_api_version()  # doctest: +SKIP
        12

        Source: KVM_GET_API_VERSION.
        """
        return self._call("KVM_GET_API_VERSION")

    def vcpu_run_bytes(self) -> int:
        """Return the size of a vCPU's shared run area, in bytes.

        >>> kvm.vcpu_run_bytes()  # doctest: +SKIP
        12288

        Source: KVM_GET_VCPU_MMAP_SIZE.
        """
        return self._call("KVM_GET_VCPU_MMAP_SIZE")

    def supported_cpuid(self) -> Struct:
        """Return ``struct kvm_cpuid2`` with all that KVM can offer to guests.

        >>> for entry in kvm.supported_cpuid().entries: print(entry)  # doctest: +SKIP
        kvm_cpuid_entry2(function=0, index=0, flags=0, eax=0x10, ebx=0x68747541, …)

        Source: KVM_GET_SUPPORTED_CPUID.
        """
        return self._get_table("KVM_GET_SUPPORTED_CPUID", "kvm_cpuid2", 128)

    def emulated_cpuid(self) -> Struct:
        """Return ``struct kvm_cpuid2`` of features that KVM emulates (slowly), e.g. MOVBE.

        >>> [hex(entry.function) for entry in kvm.emulated_cpuid().entries]  # doctest: +SKIP
        ['0x0', '0x1', '0x7']

        Source: KVM_GET_EMULATED_CPUID, with KVM_CAP_EXT_EMUL_CPUID.
        """
        return self._get_table("KVM_GET_EMULATED_CPUID", "kvm_cpuid2")

    def supported_hv_cpuid(self) -> Struct:
        """Return ``struct kvm_cpuid2`` of the Hyper-V leaves that KVM can offer.

        :raises IoctlError: ``ENOTTY`` or ``EINVAL`` without KVM_CAP_SYS_HYPERV_CPUID

        Source: KVM_GET_SUPPORTED_HV_CPUID.
        """
        return self._get_table("KVM_GET_SUPPORTED_HV_CPUID", "kvm_cpuid2")

    def msr_index_list(self) -> list[int]:
        """Return the MSRs that make up the state of a guest, to save and restore.

        >>> [hex(msr) for msr in kvm.msr_index_list()[:3]]  # doctest: +SKIP
        ['0x174', '0x175', '0x176']

        Source: KVM_GET_MSR_INDEX_LIST.
        """
        table = self._get_table("KVM_GET_MSR_INDEX_LIST", "kvm_msr_list", 256)
        return list(table.indices)

    def msr_feature_index_list(self) -> list[int]:
        """Return the MSRs that describe features of the host; read them with :meth:`get_msrs`.

        >>> [hex(msr) for msr in kvm.msr_feature_index_list()]  # doctest: +SKIP
        ['0x8b', '0x10a', '0x345', '0xce']

        Source: KVM_GET_MSR_FEATURE_INDEX_LIST, with KVM_CAP_GET_MSR_FEATURES.
        """
        table = self._get_table("KVM_GET_MSR_FEATURE_INDEX_LIST", "kvm_msr_list")
        return list(table.indices)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Return the values of feature MSRs.

        >>> kvm.get_msrs([0x8B])  # microcode revision  # doctest: +SKIP
        {139: 16777317}

        :return: by index; a list that ends early: KVM stops at the first that it refuses

        Source: KVM_GET_MSRS on /dev/kvm, with KVM_CAP_GET_MSR_FEATURES.
        """
        table = msr_table(dict.fromkeys(indices, 0))
        n_read = self._pass("KVM_GET_MSRS", table, nmsrs=table.nmsrs)
        return {entry.index: entry.data for entry in table.entries[:n_read]}

    def mce_cap_supported(self) -> int:
        """Return the machine-check capabilities a vCPU may have, as in IA32_MCG_CAP.

        >>> hex(kvm.mce_cap_supported())  # doctest: +SKIP
        '0x1000100'

        Source: KVM_X86_GET_MCE_CAP_SUPPORTED, with KVM_CAP_MCE.
        """
        # SAFETY: the number lives until the call returns.
        value = ffi.new("uint64_t *")
        self._pass("KVM_X86_GET_MCE_CAP_SUPPORTED", value)
        return int(value[0])

    def create_vm(self, kind: int = 0) -> KvmVm:
        """Create an empty VM. Source: KVM_CREATE_VM.

        :param kind: type of VM, a bit number of KVM_CAP_VM_TYPES: 0 is the ordinary one.
            arm64 codes the bits of a guest physical address here
        :raises IoctlError: ``EINVAL`` for a type that this KVM does not have, ``ENOMEM``
        """
        # A signal in the wrong moment ends the call with EINTR: try again.
        while True:
            result = lib.kh_ioctl_int(self.fd, lib.KVM_CREATE_VM, kind)
            if result != -errno.EINTR:
                break
        return KvmVm(check(result, "KVM_CREATE_VM", type=kind), self.vcpu_run_bytes())


def probe() -> str | None:
    """Try to create a VM; return why not, or None if it works."""
    try:
        with System() as system:
            system.create_vm().close()
    except (CapabilityError, IoctlError) as error:
        return str(error)
    return None


def _unavailable(found: str, remedy: str) -> CapabilityError:
    return CapabilityError("engine kvm", "a usable /dev/kvm", found, remedy)


def _open_remedy(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "load kvm_intel or kvm_amd, or use --engine emulated"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "join the group that owns /dev/kvm (often kvm), or use --engine emulated"
    return "see dmesg, or use --engine emulated"
