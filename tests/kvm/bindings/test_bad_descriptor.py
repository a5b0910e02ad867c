"""Every wrapper, on a descriptor that is none, and on one of another kind."""

from __future__ import annotations

import errno
import inspect
import os
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmhost._ffi import ffi
from kvmhost.errors import IoctlError, KvmHostError
from kvmhost.kvm import KvmVcpu, KvmVm, Struct, System
from kvmhost.kvm.descriptor import Descriptor
from kvmhost.kvm.device import Device
from kvmhost.kvm.guestmemfd import GuestMemfd
from kvmhost.kvm.stats import Stats

CLASSES: dict[str, type[Descriptor]] = {
    kind.__name__: kind for kind in (System, KvmVm, KvmVcpu, Device, GuestMemfd, Stats)
}

#: Methods that make no request of KVM, and why.
NO_REQUEST = {
    "close": "closes",
    "KvmVcpu.complete_read": "writes to the run page",
    "KvmVcpu.complete_msr": "writes to the run page",
    "KvmVcpu.complete_hypercall": "writes to the run page",
    "KvmVcpu.run_page": "a view",
    "KvmVcpu.sync_registers": "writes to the run page",
    "KvmVcpu.kick": "a signal to a thread",
}

WORDS = array("Q", [0])
ATTRIBUTES = {"has_attr": (0, 0), "get_attr": (0, 0), "set_attr": (0, 0, 0)}
XEN = {"xen_get_attr": (0,), "xen_set_attr": ({},)}

#: Arguments for every method that makes a request.
CALLS: dict[str, dict[str, tuple[Any, ...]]] = {
    "System": ATTRIBUTES
    | {
        "check_extension": (0,),
        "create_vm": (),
        "emulated_cpuid": (),
        "get_api_version": (),
        "get_msrs": ([0x10],),
        "mce_cap_supported": (),
        "msr_feature_index_list": (),
        "msr_index_list": (),
        "supported_cpuid": (),
        "supported_hv_cpuid": (),
        "vcpu_run_bytes": (),
    },
    "KvmVm": ATTRIBUTES
    | XEN
    | {
        "check_extension": (0,),
        "clear_dirty_log": (0, 0, 64, WORDS),
        "coalesce": (0, 1),
        "create_device": (4,),
        "create_guest_memfd": (4096,),
        "create_irqchip": (),
        "create_pit": (),
        "create_pit2": (),
        "create_vcpu": (0,),
        "delete_memory_region": (0,),
        "enable_cap": (0,),
        "exit_on_msrs": (1,),
        "get_clock": (),
        "get_dirty_log": (0, WORDS),
        "get_irqchip": (0,),
        "get_nr_mmu_pages": (),
        "get_pit": (),
        "get_pit2": (),
        "get_tsc_khz": (),
        "hyperv_eventfd": (0, 0),
        "ioeventfd": (0, 0, 1),
        "irq_line": (0, 0),
        "irq_line_status": (0, 0),
        "irqfd": (0, 0),
        "memory_encrypt_op": (Struct("kvm_sev_cmd"),),
        "register_encrypted_region": (0, 4096),
        "reinject_control": (True,),
        "remove_coalesced": (0, 1),
        "remove_ioeventfd": (0, 0, 1),
        "remove_irqfd": (0, 0),
        "reset_dirty_rings": (),
        "set_boot_cpu_id": (0,),
        "set_clock": ({},),
        "set_gsi_routing": ([],),
        "set_identity_map_addr": (0,),
        "set_irqchip": ({},),
        "set_memory_attributes": (0, 4096, 0),
        "set_memory_region": (0, 0, 0, 0),
        "set_memory_region2": (0, 0, 0, 0),
        "set_msr_filter": ([],),
        "set_nr_mmu_pages": (64,),
        "set_pit": ({},),
        "set_pit2": ({},),
        "set_pmu_event_filter": ([], True),
        "set_tsc_khz": (1,),
        "set_tss_addr": (0,),
        "signal_msi": (0, 0),
        "split_irqchip": (),
        "stats": (),
        "unregister_encrypted_region": (0, 4096),
        "xen_hvm_config": ({},),
        "xen_send_event": (0, 0),
    },
    "KvmVcpu": ATTRIBUTES
    | XEN
    | {
        "enable_cap": (0,),
        "get_cpuid": (),
        "get_debugregs": (),
        "get_fpu": (),
        "get_lapic": (),
        "get_mp_state": (),
        "get_msrs": ([0x10],),
        "get_nested_state": (128,),
        "get_one_reg": (0,),
        "get_regs": (),
        "get_sregs": (),
        "get_sregs2": (),
        "get_tsc_khz": (),
        "get_tsc_offset": (),
        "get_vcpu_events": (),
        "get_xcrs": (),
        "get_xsave": (),
        "get_xsave2": (4096,),
        "interrupt": (0,),
        "kvmclock_ctrl": (),
        "nmi": (),
        "pre_fault_memory": (0, 4096),
        "reg_list": (),
        "run": (),
        "set_cpuid": ({},),
        "set_cpuid1": ({},),
        "set_debugregs": ({},),
        "set_fpu": ({},),
        "set_guest_debug": (0,),
        "set_lapic": ({},),
        "set_mce": (0, 0),
        "set_mp_state": (0,),
        "set_msrs": ({0x10: 0},),
        "set_nested_state": (b"",),
        "set_one_reg": (0, 0),
        "set_regs": ({},),
        "set_signal_mask": (set(),),
        "set_sregs": ({},),
        "set_sregs2": ({},),
        "set_tsc_khz": (1,),
        "set_tsc_offset": (0,),
        "set_vapic_addr": (0,),
        "set_vcpu_events": ({},),
        "set_xcrs": ({},),
        "set_xsave": ({},),
        "setup_mce": (0,),
        "single_step": (),
        "smi": (),
        "stats": (),
        "supported_hv_cpuid": (),
        "tpr_access_reporting": (True,),
        "translate": (0,),
    },
    "Device": ATTRIBUTES,
    "GuestMemfd": {"map": (), "punch": (0, 4096)},
    "Stats": {"read": (), "numpy": (), "values": ()},
}
PAIRS = [(kind, name) for kind, methods in CALLS.items() for name in methods]


def on(kind: str, fd: int) -> Any:
    """Make an object of that kind around a descriptor, without asking the kernel."""
    cls = CLASSES[kind]
    made = cls.__new__(cls)
    Descriptor.__init__(made, fd)
    if isinstance(made, KvmVm):
        made._run_bytes, made._slot_bytes = 4096, {}
    if isinstance(made, KvmVcpu):
        made.index, made.core = 0, ffi.new("struct kh_vcpu *", {"fd": fd})
    if isinstance(made, GuestMemfd):
        made.n_bytes = 4096
    if isinstance(made, Stats):
        made._n_bytes, made._data_offset, made.descriptors = 8, 0, {}
    return made


@pytest.fixture
def null_fd() -> Iterator[int]:
    fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("kind", CLASSES)
def test_no_wrapper_is_missing_here(kind: str) -> None:
    public = {
        name
        for name, member in inspect.getmembers(CLASSES[kind])
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    }
    left_out = {name for name in public if name in NO_REQUEST or f"{kind}.{name}" in NO_REQUEST}
    assert public - left_out == set(CALLS[kind])


@pytest.mark.parametrize(("kind", "name"), PAIRS, ids=lambda value: str(value))
def test_no_descriptor(kind: str, name: str) -> None:
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        getattr(on(kind, -1), name)(*CALLS[kind][name])
    assert caught.value.errno == errno.EBADF
    if kind != "GuestMemfd" or name != "map":
        assert isinstance(caught.value, IoctlError)


@pytest.mark.parametrize(("kind", "name"), PAIRS, ids=lambda value: str(value))
def test_a_descriptor_of_another_kind(kind: str, name: str, null_fd: int) -> None:
    attempt: Callable[..., Any] = getattr(on(kind, null_fd), name)
    if name == "has_attr":
        assert attempt(*CALLS[kind][name]) is False
        return
    # /dev/null has no statistics (it is empty), and no pages to map or to punch.
    error = KvmHostError if kind == "Stats" else OSError
    with pytest.raises(error) as caught:
        attempt(*CALLS[kind][name])
    answer = {"GuestMemfd": errno.ENODEV, "Stats": None}.get(kind, errno.ENOTTY)
    assert getattr(caught.value, "errno", None) == answer


@pytest.mark.requires_kvm
def test_a_closed_descriptor_is_none() -> None:
    system = System()
    vm = system.create_vm()
    vcpu = vm.create_vcpu(0)
    for opened in (vcpu, vm, system):
        opened.close()
        opened.close()
    vcpu.complete_read(b"1")
    vcpu.complete_msr(1)
    vcpu.complete_hypercall(1)
    vcpu.kick()
    for attempt in (vcpu.get_regs, vcpu.run, vm.get_clock, system.get_api_version):
        with pytest.raises(IoctlError) as caught:
            attempt()
        assert caught.value.errno == errno.EBADF
