"""The VM descriptor: vCPUs, devices, clocks, exits of MSRs; memory and interrupts beside it.

Memory is in :mod:`~kvmhost.kvm.vm_memory`, interrupts in
:mod:`~kvmhost.kvm.vm_irq`, writes that end in the kernel in
:mod:`~kvmhost.kvm.vm_events`, Xen in :mod:`~kvmhost.kvm.xen`.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

from kvmhost._ffi import ffi, lib
from kvmhost.kvm.caps import Cap
from kvmhost.kvm.descriptor import Attributes, Capabilities, Source
from kvmhost.kvm.structs import Struct
from kvmhost.kvm.vcpu import KvmVcpu
from kvmhost.kvm.vm_events import VmEvents
from kvmhost.kvm.vm_irq import VmInterrupts
from kvmhost.kvm.vm_memory import VmMemory
from kvmhost.kvm.xen import VmXen

if typing.TYPE_CHECKING:
    from kvmhost.kvm.device import Device
    from kvmhost.kvm.filters import MsrRange
    from kvmhost.kvm.stats import Stats

__all__ = ["KvmVm"]


class KvmVm(VmMemory, VmInterrupts, VmEvents, VmXen, Attributes, Capabilities):
    """A VM, as KVM_CREATE_VM returned it. Owns its descriptor.

    KVM frees the VM with its last descriptor: VM, vCPUs, devices, statistics.

    >>> with System() as kvm, kvm.create_vm() as vm:  # doctest: +SKIP
    ...     vm.create_irqchip()
    ...     vcpu = vm.create_vcpu(0)
    """

    def __init__(self, fd: int, vcpu_run_bytes: int) -> None:
        super().__init__(fd)
        self._run_bytes = vcpu_run_bytes

    def create_vcpu(self, index: int) -> KvmVcpu:
        """Create vCPU ``index``. Source: KVM_CREATE_VCPU.

        With local APICs in the kernel, vCPUs other than the first wait for INIT and SIPI.

        :raises IoctlError: ``EEXIST`` if it exists, ``EINVAL`` above KVM_CAP_MAX_VCPUS
        """
        return KvmVcpu(self._call("KVM_CREATE_VCPU", index, id=index), index, self._run_bytes)

    def create_device(self, kind: int, test: bool = False) -> Device | None:
        """Create a device of the kernel, of a kind such as ``KVM_DEV_TYPE_VFIO``.

        >>> vfio = vm.create_device(lib.KVM_DEV_TYPE_VFIO)  # doctest: +SKIP

        :param test: only check whether it could be created; returns None
        :raises IoctlError: ``ENODEV`` if this KVM has no such device, ``EEXIST`` or
            ``EBUSY`` if the VM has one

        Source: KVM_CREATE_DEVICE. Interrupt controllers of arm64 are such devices.
        """
        from kvmhost.kvm.device import Device

        flags = lib.KVM_CREATE_DEVICE_TEST if test else 0
        request = Struct("kvm_create_device", type=kind, flags=flags)
        self._pass("KVM_CREATE_DEVICE", request, type=kind, flags=flags)
        return None if test else Device(request.fd, kind)

    def stats(self) -> Stats:
        """Open the VM's statistics. Source: KVM_GET_STATS_FD.

        >>> with vm.stats() as stats: stats.read()["remote_tlb_flush"].value  # doctest: +SKIP
        4

        :raises IoctlError: ``ENOTTY`` without KVM_CAP_BINARY_STATS_FD
        """
        from kvmhost.kvm.stats import Stats

        return Stats(self._call("KVM_GET_STATS_FD"))

    def set_tss_addr(self, gpa: int) -> None:
        """Name three pages below 4 GiB that KVM may use where no slot is (Intel).

        Source: KVM_SET_TSS_ADDR.
        """
        self._call("KVM_SET_TSS_ADDR", gpa, gpa=gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """Set the page below 4 GiB of KVM's identity map (Intel); before the first vCPU.

        >>> vm.set_identity_map_addr(0xFFFB_C000)  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` after the first vCPU

        Source: KVM_SET_IDENTITY_MAP_ADDR.
        """
        # SAFETY: the number lives until the call returns.
        self._pass("KVM_SET_IDENTITY_MAP_ADDR", ffi.new("uint64_t *", gpa), gpa=gpa)

    def get_clock(self) -> Struct:
        """Return ``struct kvm_clock_data``: kvmclock in ns, wall clock and TSC with it.

        ``flags`` marks the valid fields: ``KVM_CLOCK_REALTIME``,
        ``KVM_CLOCK_HOST_TSC``, and ``KVM_CLOCK_TSC_STABLE``.

        >>> vm.get_clock().clock  # nanoseconds since the VM was made  # doctest: +SKIP
        41522710

        Source: KVM_GET_CLOCK.
        """
        return self._get("KVM_GET_CLOCK", "kvm_clock_data")

    def set_clock(self, data: Source) -> None:
        """Set kvmclock; with ``KVM_CLOCK_REALTIME``, moved on by what passed since then.

        >>> vm.set_clock({"clock": 10**9})  # one second  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` for flags other than ``KVM_CLOCK_REALTIME``

        Source: KVM_SET_CLOCK.
        """
        self._set("KVM_SET_CLOCK", "kvm_clock_data", data)

    def set_tsc_khz(self, khz: int) -> None:
        """Set the TSC frequency of vCPUs that are yet to be made.

        :raises IoctlError: ``EINVAL`` without KVM_CAP_VM_TSC_CONTROL or after the first vCPU

        Source: KVM_SET_TSC_KHZ on a VM.
        """
        self._call("KVM_SET_TSC_KHZ", khz, khz=khz)

    def get_tsc_khz(self) -> int:
        """Return the TSC frequency that new vCPUs get, in kHz.

        >>> vm.get_tsc_khz()  # doctest: +SKIP
        2596144

        :raises IoctlError: ``EINVAL`` or ``ENOTTY`` before Linux 5.18

        Source: KVM_GET_TSC_KHZ on a VM.
        """
        return self._call("KVM_GET_TSC_KHZ")

    def exit_on_msrs(self, reasons: int) -> None:
        """Turn MSR accesses that KVM refuses into exits.

        >>> vm.exit_on_msrs(lib.KVM_MSR_EXIT_REASON_FILTER)  # doctest: +SKIP

        :param reasons: ``KVM_MSR_EXIT_REASON_INVAL``, ``_UNKNOWN``, ``_FILTER``: which ones
        :raises IoctlError: ``EINVAL`` for other bits

        Source: KVM_ENABLE_CAP with KVM_CAP_X86_USER_SPACE_MSR.
        """
        self.enable_cap(Cap.X86_USER_SPACE_MSR, reasons)

    def set_msr_filter(self, ranges: Sequence[MsrRange], allow: bool = True) -> None:
        """Refuse or allow the guest's access to MSRs by ranges.

        A refused access is #GP, or an exit after :meth:`exit_on_msrs`. No ranges and
        ``allow`` switch the filter off. x2APIC registers are never filtered.

        >>> vm.set_msr_filter([MsrRange.refuse(0x10)])  # doctest: +SKIP

        :param allow: what happens to MSRs outside all ranges
        :raises IoctlError: ``EINVAL`` for more than 16 ranges or 0x600 bytes of bitmap, or
            without ``allow`` and no range

        Source: KVM_X86_SET_MSR_FILTER.
        """
        from kvmhost.kvm.filters import build_msr_filter

        request, keep = build_msr_filter(ranges, allow)
        # SAFETY: keep references the bitmaps that the filter points to until the call returns.
        self._pass("KVM_X86_SET_MSR_FILTER", request, ranges=len(keep))

    def set_pmu_event_filter(self, events: Sequence[int], allow: bool, flags: int = 0) -> None:
        """Set which events the guest may count.

        >>> vm.set_pmu_event_filter([0xC0], allow=True)  # instructions retired  # doctest: +SKIP

        :param events: event select and unit mask, as in PERF_EVTSEL
        :param allow: count only these, or all except these
        :raises IoctlError: ``EINVAL`` for flags or an action that KVM does not know

        Source: KVM_SET_PMU_EVENT_FILTER.
        """
        action = lib.KVM_PMU_EVENT_ALLOW if allow else lib.KVM_PMU_EVENT_DENY
        table = Struct("kvm_pmu_event_filter", events=list(events), action=action, flags=flags)
        self._pass("KVM_SET_PMU_EVENT_FILTER", table, action=action, nevents=len(events))
