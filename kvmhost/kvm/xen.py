"""What KVM offers to guests that expect Xen below them."""

from __future__ import annotations

from kvmhost.kvm.descriptor import Descriptor, Source
from kvmhost.kvm.structs import Struct

__all__ = ["VcpuXen", "VmXen"]


class VmXen(Descriptor):
    """The Xen requests of a VM. All need KVM_CAP_XEN_HVM (``ENOTTY`` without)."""

    def xen_hvm_config(self, config: Source) -> None:
        """Set MSR and hypercall pages, ``struct kvm_xen_hvm_config``.

        Source: KVM_XEN_HVM_CONFIG.
        """
        self._set("KVM_XEN_HVM_CONFIG", "kvm_xen_hvm_config", config)

    def xen_get_attr(self, kind: int) -> Struct:
        """Return ``struct kvm_xen_hvm_attr`` of a ``KVM_XEN_ATTR_TYPE_…``.

        >>> vm.xen_get_attr(lib.KVM_XEN_ATTR_TYPE_LONG_MODE).u.long_mode  # doctest: +SKIP
        1

        Source: KVM_XEN_HVM_GET_ATTR.
        """
        return self._get("KVM_XEN_HVM_GET_ATTR", "kvm_xen_hvm_attr", type=kind)

    def xen_set_attr(self, attr: Source) -> None:
        """Set an attribute from ``struct kvm_xen_hvm_attr``.

        >>> vm.xen_set_attr({"type": lib.KVM_XEN_ATTR_TYPE_LONG_MODE, "u": {"long_mode": 1}})
        ... # doctest: +SKIP

        Source: KVM_XEN_HVM_SET_ATTR.
        """
        self._set("KVM_XEN_HVM_SET_ATTR", "kvm_xen_hvm_attr", attr)

    def xen_send_event(self, port: int, vcpu_id: int, priority: int = 0xFFFFFFFF) -> int:
        """Raise an event channel.

        :param priority: all ones for two-level delivery, the only kind

        Source: KVM_XEN_HVM_EVTCHN_SEND.
        """
        fields = {"port": port, "vcpu": vcpu_id, "priority": priority}
        return self._make("KVM_XEN_HVM_EVTCHN_SEND", "kvm_irq_routing_xen_evtchn", **fields)


class VcpuXen(Descriptor):
    """The Xen requests of a vCPU. All need KVM_CAP_XEN_HVM (``ENOTTY`` without)."""

    def xen_get_attr(self, kind: int) -> Struct:
        """Return ``struct kvm_xen_vcpu_attr`` of a ``KVM_XEN_VCPU_ATTR_TYPE_…``.

        Source: KVM_XEN_VCPU_GET_ATTR.
        """
        return self._get("KVM_XEN_VCPU_GET_ATTR", "kvm_xen_vcpu_attr", type=kind)

    def xen_set_attr(self, attr: Source) -> None:
        """Set an attribute from ``struct kvm_xen_vcpu_attr``.

        Source: KVM_XEN_VCPU_SET_ATTR.
        """
        self._set("KVM_XEN_VCPU_SET_ATTR", "kvm_xen_vcpu_attr", attr)
