"""Interrupts of a VM: controllers in the kernel, their lines, routes, MSIs, the timer chip.

Without a controller in the kernel (:meth:`VmInterrupts.create_irqchip`, or
:meth:`VmInterrupts.split_irqchip` for the local APICs alone) most requests here return
``ENXIO``. Create controllers before the first vCPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvmhost._ffi import ffi, lib
from kvmhost.kvm.caps import Cap
from kvmhost.kvm.descriptor import Enabling, Source
from kvmhost.kvm.structs import Struct

__all__ = ["VmInterrupts", "irqchip_route", "msi_route"]


class VmInterrupts(Enabling):
    """The requests of a VM that have to do with interrupts."""

    def create_irqchip(self) -> None:
        """Create both PICs, an IOAPIC of 24 pins and a local APIC per vCPU in the kernel.

        GSIs 0 to 15 go to PIC and IOAPIC, 16 to 23 to the IOAPIC alone.

        >>> vm.create_irqchip()  # doctest: +SKIP

        :raises IoctlError: ``EEXIST`` if there is one, ``EINVAL`` after the first vCPU

        Source: KVM_CREATE_IRQCHIP.
        """
        self._call("KVM_CREATE_IRQCHIP")

    def split_irqchip(self, n_routes: int = 24) -> None:
        """Create only the local APICs in the kernel; the caller emulates PICs and IOAPIC.

        >>> vm.split_irqchip()  # doctest: +SKIP

        An interrupt that the guest ends becomes an exit
        (:class:`~kvmhost.exits.IoapicEoi`) if a level-triggered route requires it.

        :param n_routes: GSIs to reserve for the caller's IOAPIC
        :raises IoctlError: ``EEXIST`` if there is a controller, ``EINVAL`` for too many

        Source: KVM_ENABLE_CAP with KVM_CAP_SPLIT_IRQCHIP.
        """
        self.enable_cap(Cap.SPLIT_IRQCHIP, n_routes)

    def get_irqchip(self, chip: int) -> Struct:
        """Return ``struct kvm_irqchip`` of one controller.

        >>> vm.get_irqchip(lib.KVM_IRQCHIP_IOAPIC).chip.ioapic.base_address  # doctest: +SKIP
        4273995776

        :param chip: ``KVM_IRQCHIP_PIC_MASTER``, ``_PIC_SLAVE`` or ``_IOAPIC``
        :raises IoctlError: ``ENXIO`` without controllers, ``EINVAL`` for another number

        Source: KVM_GET_IRQCHIP.
        """
        return self._get("KVM_GET_IRQCHIP", "kvm_irqchip", chip_id=chip)

    def set_irqchip(self, state: Source) -> None:
        """Set one controller from ``struct kvm_irqchip``; its ``chip_id`` selects it.

        >>> state = vm.get_irqchip(0); state.chip.pic.imr = 0; vm.set_irqchip(state)
        ... # doctest: +SKIP

        :raises IoctlError: as :meth:`get_irqchip`

        Source: KVM_SET_IRQCHIP.
        """
        self._set("KVM_SET_IRQCHIP", "kvm_irqchip", state)

    def irq_line(self, gsi: int, level: int) -> None:
        """Raise (1) or lower (0) an interrupt line.

        >>> vm.irq_line(4, 1); vm.irq_line(4, 0)  # a pulse  # doctest: +SKIP

        arm64 codes interrupt type, vCPU and number into ``gsi``.

        :raises IoctlError: ``ENXIO`` without controllers

        Source: KVM_IRQ_LINE.
        """
        self._make("KVM_IRQ_LINE", "kvm_irq_level", irq=gsi, level=level)

    def irq_line_status(self, gsi: int, level: int) -> int:
        """Raise or lower a line, and return what became of it.

        >>> vm.irq_line_status(4, 1)  # doctest: +SKIP
        1

        :return: above 0: the number of vCPUs that received it; 0: merged with one that was
            pending; below 0: ignored (masked, or no route)
        :raises IoctlError: ``ENXIO`` without controllers

        Source: KVM_IRQ_LINE_STATUS, with KVM_CAP_IRQ_INJECT_STATUS.
        """
        request = Struct("kvm_irq_level", irq=gsi, level=level)
        self._pass("KVM_IRQ_LINE_STATUS", request, irq=gsi, level=level)
        return int(ffi.cast("int32_t", request.irq))

    def set_gsi_routing(self, entries: Iterable[Source | dict[str, Any]]) -> None:
        """Replace all routes from GSIs to pins and messages.

        >>> vm.set_gsi_routing([irqchip_route(4), msi_route(24, 0xFEE00000, 0x31)])
        ... # doctest: +SKIP

        :param entries: ``struct kvm_irq_routing_entry`` or their fields; see
            :func:`irqchip_route` and :func:`msi_route`
        :raises IoctlError: ``EINVAL`` for a bad entry or more than KVM_CAP_IRQ_ROUTING

        Source: KVM_SET_GSI_ROUTING.
        """
        table = Struct("kvm_irq_routing", entries=list(entries))
        self._pass("KVM_SET_GSI_ROUTING", table, nr=table.nr)

    def signal_msi(self, address: int, data: int, devid: int | None = None) -> int:
        """Deliver a message-signalled interrupt at once, without a route.

        >>> vm.signal_msi(0xFEE00000, 0x31)  # vector 0x31 to APIC 0, fixed  # doctest: +SKIP
        1

        :param address: bits 12 to 19 name the APIC; 0xfee00000 for APIC 0
        :param data: bits 0 to 7 are the vector, 8 to 10 the delivery mode
        :param devid: device id, which only arm64's ITS needs
        :return: 1 delivered, 0 blocked by the guest
        :raises IoctlError: ``EINVAL`` without local APICs in the kernel

        Source: KVM_SIGNAL_MSI.
        """
        flags = 0 if devid is None else lib.KVM_MSI_VALID_DEVID
        high, low = address >> 32, address & 0xFFFFFFFF
        fields = {"address_lo": low, "address_hi": high, "data": data, "flags": flags}
        return self._make("KVM_SIGNAL_MSI", "kvm_msi", devid=devid or 0, **fields)

    def irqfd(self, eventfd: int, gsi: int, resample_eventfd: int | None = None) -> None:
        """Let every write to an eventfd pulse a GSI, inside the kernel.

        >>> bell = os.eventfd(0, os.EFD_CLOEXEC)  # doctest: +SKIP
        >>> vm.irqfd(bell, 4)  # doctest: +SKIP

        :param resample_eventfd: makes the GSI level-triggered: it stays up until the
            guest ends the interrupt, which KVM signals through this eventfd
        :raises IoctlError: ``EBUSY`` if the eventfd has a GSI, ``EBADF`` for none,
            ``EINVAL`` without controllers (with ``resample_eventfd``)

        Source: KVM_IRQFD.
        """
        flags = 0 if resample_eventfd is None else lib.KVM_IRQFD_FLAG_RESAMPLE
        fields = {"fd": eventfd, "gsi": gsi, "flags": flags}
        self._make("KVM_IRQFD", "kvm_irqfd", resamplefd=resample_eventfd or 0, **fields)

    def remove_irqfd(self, eventfd: int, gsi: int) -> None:
        """Undo :meth:`irqfd`; returns when no injection of it is in flight.

        >>> vm.remove_irqfd(bell, 4)  # doctest: +SKIP

        Source: KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN.
        """
        flags = lib.KVM_IRQFD_FLAG_DEASSIGN
        self._make("KVM_IRQFD", "kvm_irqfd", fd=eventfd, gsi=gsi, flags=flags)

    def create_pit2(self, speaker: bool = False) -> None:
        """Create an i8254 timer in the kernel: ports 0x40 to 0x43, interrupt on GSI 0.

        >>> vm.create_irqchip(); vm.create_pit2()  # doctest: +SKIP

        :param speaker: emulate port 0x61 as well
        :raises IoctlError: ``EEXIST`` if there is one, ``ENOENT`` without PICs in the kernel

        Source: KVM_CREATE_PIT2.
        """
        flags = lib.KVM_PIT_SPEAKER_DUMMY if speaker else 0
        self._make("KVM_CREATE_PIT2", "kvm_pit_config", flags=flags)

    def create_pit(self) -> None:
        """Create an i8254 timer in the kernel, by the older request; with a speaker port.

        :raises IoctlError: as :meth:`create_pit2`

        Source: KVM_CREATE_PIT.
        """
        self._call("KVM_CREATE_PIT")

    def get_pit2(self) -> Struct:
        """Return ``struct kvm_pit_state2``: three channels and flags.

        >>> vm.get_pit2().channels[0].count  # doctest: +SKIP
        65536

        :raises IoctlError: ``ENXIO`` without a timer chip

        Source: KVM_GET_PIT2.
        """
        return self._get("KVM_GET_PIT2", "kvm_pit_state2")

    def set_pit2(self, state: Source) -> None:
        """Set the timer chip from ``struct kvm_pit_state2``; counting restarts.

        >>> state = vm.get_pit2(); state.channels[0].count = 1193; vm.set_pit2(state)
        ... # doctest: +SKIP

        :raises IoctlError: ``ENXIO`` without a timer chip

        Source: KVM_SET_PIT2.
        """
        self._set("KVM_SET_PIT2", "kvm_pit_state2", state)

    def get_pit(self) -> Struct:
        """Return ``struct kvm_pit_state``: as :meth:`get_pit2`, without the flags.

        Source: KVM_GET_PIT.
        """
        return self._get("KVM_GET_PIT", "kvm_pit_state")

    def set_pit(self, state: Source) -> None:
        """Set the timer chip from ``struct kvm_pit_state``.

        Source: KVM_SET_PIT.
        """
        self._set("KVM_SET_PIT", "kvm_pit_state", state)

    def reinject_control(self, reinject: bool) -> None:
        """Set whether KVM reinjects timer ticks that the guest missed.

        >>> vm.reinject_control(False)  # doctest: +SKIP

        :raises IoctlError: ``ENXIO`` without a timer chip

        Source: KVM_REINJECT_CONTROL.
        """
        self._make("KVM_REINJECT_CONTROL", "kvm_reinject_control", pit_reinject=int(reinject))

    def set_boot_cpu_id(self, vcpu_id: int) -> None:
        """Name the vCPU that starts running; the others wait for INIT and SIPI. First is 0.

        >>> vm.set_boot_cpu_id(1)  # doctest: +SKIP

        :raises IoctlError: ``EBUSY`` after the first vCPU

        Source: KVM_SET_BOOT_CPU_ID.
        """
        self._call("KVM_SET_BOOT_CPU_ID", vcpu_id, vcpu_id=vcpu_id)

    def hyperv_eventfd(self, conn_id: int, eventfd: int, remove: bool = False) -> None:
        """Let a Hyper-V guest's HvSignalEvent write an eventfd.

        >>> vm.hyperv_eventfd(1, bell)  # doctest: +SKIP

        :raises IoctlError: ``ENOTTY`` without KVM_CAP_HYPERV_EVENTFD

        Source: KVM_HYPERV_EVENTFD.
        """
        flags = lib.KVM_HYPERV_EVENTFD_DEASSIGN if remove else 0
        fields = {"conn_id": conn_id, "fd": eventfd, "flags": flags}
        self._make("KVM_HYPERV_EVENTFD", "kvm_hyperv_eventfd", **fields)


def irqchip_route(gsi: int, chip: int | None = None, pin: int | None = None) -> Mapping[str, Any]:
    """Return the entry that leads a GSI to a pin of a controller.

    >>> irqchip_route(4)["u"]
    {'irqchip': {'irqchip': 2, 'pin': 4}}

    :param chip: ``KVM_IRQCHIP_…``; the IOAPIC if not given
    :param pin: the GSI's number if not given
    """
    where = lib.KVM_IRQCHIP_IOAPIC if chip is None else chip
    to = {"irqchip": where, "pin": gsi if pin is None else pin}
    return {"gsi": gsi, "type": lib.KVM_IRQ_ROUTING_IRQCHIP, "u": {"irqchip": to}}


def msi_route(gsi: int, address: int, data: int) -> Mapping[str, Any]:
    """Return the entry that turns a GSI into a message.

    >>> msi_route(24, 0xFEE00000, 0x31)["u"]["msi"]["data"]
    49
    """
    to = {"address_lo": address & 0xFFFFFFFF, "address_hi": address >> 32, "data": data}
    return {"gsi": gsi, "type": lib.KVM_IRQ_ROUTING_MSI, "u": {"msi": to}}
