"""Interrupts: raised from outside, taken by a guest of a few bytes in real mode."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from waiting import DEADLINE_S

from kvmhost._ffi import lib
from kvmhost.errors import IoctlError
from kvmhost.exits import Hlt, IoapicEoi, Kicked, TprAccess
from kvmhost.kvm import KvmVm, Struct
from kvmhost.kvm.vm_irq import irqchip_route, msi_route

pytestmark = [pytest.mark.requires_kvm, pytest.mark.requires_cap("IRQCHIP")]

Maker = Callable[..., Any]

# sti; jmp to itself: waits for interrupts
WAIT = bytes.fromhex("fb eb fe")
# mov eax, N; out 0x80, eax; iret, with the number of the vector as N
MSI_ADDRESS = 0xFEE00000


def handler(number: int, end: bytes = b"") -> bytes:
    say = b"\x66\xb8" + number.to_bytes(4, "little") + bytes.fromhex("66 e7 80")
    return say + end + b"\xcf"


@pytest.fixture
def eventfd() -> Iterator[int]:
    made = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield made
    os.close(made)


def with_pic(vm: KvmVm, level: int = 0) -> None:
    """Both controllers in the kernel; the master PIC open, with vectors from 0x20."""
    vm.create_irqchip()
    state = vm.get_irqchip(lib.KVM_IRQCHIP_PIC_MASTER)
    state.chip.pic.update(irq_base=0x20, imr=0, elcr=level)
    vm.set_irqchip(state)


def with_apic(guest: Any) -> None:
    """Enable the local APIC by its spurious vector register."""
    lapic = guest.vcpu.get_lapic()
    lapic.regs.raw().cast("I")[0xF0 // 4] = 0x1FF
    guest.vcpu.set_lapic(lapic)


@pytest.mark.covers("KVM_CREATE_IRQCHIP", "KVM_GET_IRQCHIP", "KVM_SET_IRQCHIP", "KVM_IRQ_LINE")
def test_a_line_interrupts_the_guest_through_the_pic(tiny: Maker) -> None:
    guest = tiny(WAIT, with_pic)
    guest.vector(0x24, handler(0x24))
    guest.vm.irq_line(4, 1)
    assert guest.out() == 0x24
    pic = guest.vm.get_irqchip(lib.KVM_IRQCHIP_PIC_MASTER).chip.pic
    assert pic.isr == 1 << 4
    with pytest.raises(IoctlError) as caught:
        guest.vm.get_irqchip(7)
    assert caught.value.errno == errno.EINVAL


def test_without_controllers_there_are_no_lines(vm: KvmVm) -> None:
    for attempt in (lambda: vm.irq_line(4, 1), lambda: vm.get_irqchip(0), vm.get_pit2):
        with pytest.raises(IoctlError) as caught:
            attempt()
        assert caught.value.errno == errno.ENXIO


@pytest.mark.requires_cap("IRQ_INJECT_STATUS")
@pytest.mark.covers("KVM_IRQ_LINE_STATUS")
def test_a_line_tells_what_became_of_it(tiny: Maker) -> None:
    guest = tiny(WAIT, with_pic)
    assert guest.vm.irq_line_status(4, 1) > 0
    guest.vm.irq_line_status(4, 0)
    assert guest.vm.irq_line_status(4, 1) == 0  # the first one is still pending


@pytest.mark.requires_cap("IRQFD")
@pytest.mark.covers("KVM_IRQFD")
def test_an_eventfd_interrupts_until_it_is_removed(tiny: Maker, eventfd: int) -> None:
    guest = tiny(WAIT, with_pic)
    guest.vector(0x24, handler(0x24, bytes.fromhex("b0 20 e6 20")))  # end of interrupt
    guest.vm.irqfd(eventfd, 4)
    with pytest.raises(IoctlError) as caught:
        guest.vm.irqfd(eventfd, 5)
    assert caught.value.errno == errno.EBUSY
    for _ in range(2):
        os.eventfd_write(eventfd, 1)
        assert guest.out() == 0x24
    guest.vm.remove_irqfd(eventfd, 4)
    os.eventfd_write(eventfd, 1)
    assert os.eventfd_read(eventfd) == 1  # nobody took it


@pytest.mark.requires_cap("IRQFD_RESAMPLE")
@pytest.mark.covers("KVM_IRQFD")
def test_the_end_of_a_level_interrupt_comes_back(tiny: Maker, eventfd: int) -> None:
    guest = tiny(WAIT, lambda vm: with_pic(vm, level=1 << 4))
    # end of interrupt, then say it
    guest.vector(0x24, bytes.fromhex("b0 20 e6 20") + handler(0x24))
    ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        guest.vm.irqfd(eventfd, 4, resample_eventfd=ended)
        os.eventfd_write(eventfd, 1)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(ended)
        assert guest.out() == 0x24
        assert os.eventfd_read(ended) == 1
        guest.vm.remove_irqfd(eventfd, 4)
    finally:
        os.close(ended)


@pytest.mark.requires_cap("SIGNAL_MSI")
@pytest.mark.covers("KVM_SIGNAL_MSI")
def test_a_message_interrupts_the_guest(tiny: Maker) -> None:
    guest = tiny(WAIT, KvmVm.create_irqchip)
    guest.vector(0x31, handler(0x31))
    assert guest.vm.signal_msi(MSI_ADDRESS, 0x31) == 0  # the APIC is off
    with_apic(guest)
    assert guest.vm.signal_msi(MSI_ADDRESS, 0x31) == 1
    assert guest.out() == 0x31


@pytest.mark.requires_cap("IRQ_ROUTING")
@pytest.mark.covers("KVM_SET_GSI_ROUTING")
def test_a_route_turns_a_line_into_a_message(tiny: Maker) -> None:
    guest = tiny(WAIT, KvmVm.create_irqchip)
    guest.vector(0x42, handler(0x42))
    with_apic(guest)
    guest.vm.set_gsi_routing([irqchip_route(4), msi_route(24, MSI_ADDRESS, 0x42)])
    guest.vm.irq_line(24, 1)
    assert guest.out() == 0x42
    with pytest.raises(IoctlError) as caught:
        guest.vm.set_gsi_routing([{"gsi": 1, "type": 77}])
    assert caught.value.errno == errno.EINVAL


@pytest.mark.requires_cap("SPLIT_IRQCHIP")
@pytest.mark.covers("KVM_ENABLE_CAP")
def test_a_split_controller_tells_the_end_of_an_interrupt(tiny: Maker) -> None:
    # mov [0xfee000b0], eax (end of interrupt); jmp to itself
    ending = bytes.fromhex("67 66 a3 b0 00 e0 fe eb fe")
    guest = tiny(WAIT, KvmVm.split_irqchip)
    guest.vector(0x51, ending)
    with_apic(guest)
    # Level-triggered (bit 15), asserted (bit 14).
    guest.vm.set_gsi_routing([msi_route(3, MSI_ADDRESS, 0x51 | 3 << 14)])
    assert guest.vm.signal_msi(MSI_ADDRESS, 0x51 | 3 << 14) == 1
    assert guest.run() == IoapicEoi(0x51)
    with pytest.raises(IoctlError) as caught:
        guest.vm.get_irqchip(lib.KVM_IRQCHIP_IOAPIC)
    assert caught.value.errno == errno.ENXIO


@pytest.mark.requires_cap("PIT2")
@pytest.mark.covers("KVM_CREATE_PIT2", "KVM_GET_PIT2", "KVM_SET_PIT2", "KVM_REINJECT_CONTROL")
def test_the_timer_ticks_at_the_rate_that_was_set(tiny: Maker) -> None:
    def prepare(vm: KvmVm) -> None:
        with_pic(vm)
        vm.create_pit2()
        vm.reinject_control(True)

    guest = tiny(WAIT, prepare)
    guest.vector(0x20, handler(0x20, bytes.fromhex("b0 20 e6 20")))
    state = guest.vm.get_pit2()
    assert state.channels[0].count == 65536
    # Mode 2 (rate generator), 1193182 Hz / 1193 = 1000 Hz.
    state.channels[0].update(mode=2, count=1193, gate=1)
    guest.vm.set_pit2(state)
    assert guest.vm.get_pit2().channels[0].count == 1193
    assert [guest.out() for _ in range(3)] == [0x20] * 3
    with pytest.raises(IoctlError) as caught:
        guest.vm.create_pit2()
    assert caught.value.errno == errno.EEXIST


@pytest.mark.requires_cap("PIT")
@pytest.mark.covers("KVM_CREATE_PIT", "KVM_GET_PIT", "KVM_SET_PIT")
def test_the_timer_by_its_old_requests(vm: KvmVm) -> None:
    vm.create_irqchip()
    vm.create_pit()
    state = vm.get_pit()
    state.channels[0].update(mode=2, count=4000)
    vm.set_pit(state)
    assert vm.get_pit2().channels[0].to_dict() == vm.get_pit().channels[0].to_dict()
    assert vm.get_pit().channels[0].count == 4000


@pytest.mark.covers("KVM_INTERRUPT")
def test_an_interrupt_without_controllers(tiny: Maker) -> None:
    guest = tiny(b"\xfb\x90\xf4")  # sti; nop; hlt
    guest.vector(0x30, handler(0x30))
    guest.vcpu.interrupt(0x30)
    with pytest.raises(IoctlError) as caught:
        guest.vcpu.interrupt(0x100)
    assert caught.value.errno == errno.EINVAL
    assert guest.out() == 0x30
    assert guest.run() == Hlt()


@pytest.mark.requires_cap("USER_NMI")
@pytest.mark.covers("KVM_NMI")
def test_an_nmi_comes_with_interrupts_off(tiny: Maker) -> None:
    guest = tiny(b"\xf4")
    guest.vector(2, handler(2))
    guest.vcpu.nmi()
    assert guest.out() == 2


@pytest.mark.requires_cap("X86_SMM")
@pytest.mark.covers("KVM_SMI")
def test_an_smi_is_taken(tiny: Maker) -> None:
    guest = tiny(b"\xf4")
    guest.vcpu.smi()
    assert guest.vcpu.get_vcpu_events().smi.pending == 1


@pytest.mark.requires_cap("VAPIC")
@pytest.mark.covers("KVM_TPR_ACCESS_REPORTING", "KVM_SET_VAPIC_ADDR")
def test_task_priority_is_reported_and_kept_in_memory(tiny: Maker) -> None:
    # mov eax, 0x50; mov [0xfee00080], eax; out 0x80, eax; jmp to the out
    code = bytes.fromhex("66 b8 50 00 00 00 67 66 a3 80 00 e0 fe 66 e7 80 eb fb")
    guest = tiny(code, KvmVm.create_irqchip)
    with_apic(guest)
    guest.vcpu.tpr_access_reporting(True)
    # The write of the port may be first where instructions are emulated by the batch.
    reported = [vm_exit for vm_exit in (guest.run(), guest.run()) if isinstance(vm_exit, TprAccess)]
    assert [vm_exit.is_write for vm_exit in reported] == [True]
    guest.vcpu.tpr_access_reporting(False)
    assert guest.vcpu.get_lapic().regs.raw().cast("I")[0x80 // 4] == 0x50
    guest.memory[0x7000:0x7001] = b"\x60"
    guest.vcpu.set_vapic_addr(0x7000)
    assert [guest.out() for _ in range(2)] == [0x50] * 2
    assert guest.vcpu.get_lapic().regs.raw().cast("I")[0x80 // 4] == 0x60


@pytest.mark.requires_cap("MP_STATE")
@pytest.mark.covers("KVM_GET_MP_STATE")
def test_a_halted_processor_with_a_local_apic_stays_in_the_kernel(tiny: Maker) -> None:
    guest = tiny(b"\xf4", KvmVm.create_irqchip)
    assert halt(guest) == Kicked()
    assert guest.vcpu.get_mp_state() == lib.KVM_MP_STATE_HALTED


def halt(guest: Any) -> Any:
    """Run a guest that halts in the kernel; kick it out when it did."""
    from kvmhost.kvm.stats import Stats

    ended: list[Any] = []
    thread = threading.Thread(target=lambda: ended.append(guest.run()))
    with guest.vcpu.stats() as stats:
        assert isinstance(stats, Stats)
        thread.start()
        while not stats.read()["blocking"].value:
            pass
    guest.vcpu.kick()
    thread.join(DEADLINE_S)
    return ended[0]


@pytest.mark.requires_cap("HYPERV_EVENTFD")
@pytest.mark.covers("KVM_HYPERV_EVENTFD")
def test_hyperv_connections(vm: KvmVm, eventfd: int) -> None:
    vm.hyperv_eventfd(1, eventfd)
    with pytest.raises(IoctlError) as caught:
        vm.hyperv_eventfd(1, eventfd)
    assert caught.value.errno == errno.EEXIST
    vm.hyperv_eventfd(1, eventfd, remove=True)


@pytest.mark.requires_cap("XEN_HVM")
@pytest.mark.covers(
    "KVM_XEN_HVM_CONFIG",
    "KVM_XEN_HVM_GET_ATTR",
    "KVM_XEN_HVM_SET_ATTR",
    "KVM_XEN_VCPU_GET_ATTR",
    "KVM_XEN_VCPU_SET_ATTR",
)
def test_xen_attributes(vm: KvmVm) -> None:
    vm.create_irqchip()
    vm.xen_hvm_config({"flags": lib.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, "msr": 0x40000000})
    vm.xen_set_attr({"type": lib.KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, "u": {"vector": 0x50}})
    assert vm.xen_get_attr(lib.KVM_XEN_ATTR_TYPE_UPCALL_VECTOR).u.vector == 0x50
    vm.xen_set_attr({"type": lib.KVM_XEN_ATTR_TYPE_LONG_MODE, "u": {"long_mode": 1}})
    with vm.create_vcpu(0) as vcpu:
        kind = lib.KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID
        vcpu.xen_set_attr({"type": kind, "u": {"vcpu_id": 7}})
        assert vcpu.xen_get_attr(kind).u.vcpu_id == 7


@pytest.mark.requires_cap("XEN_HVM")
@pytest.mark.covers("KVM_XEN_HVM_EVTCHN_SEND")
def test_a_xen_event_is_pending_in_the_shared_page(tiny: Maker) -> None:
    guest = tiny(b"\xf4", KvmVm.create_irqchip)
    guest.vm.xen_hvm_config({"flags": lib.KVM_XEN_HVM_CONFIG_EVTCHN_SEND, "msr": 0x40000000})
    guest.vm.xen_set_attr({"type": lib.KVM_XEN_ATTR_TYPE_LONG_MODE, "u": {"long_mode": 1}})
    shared = {"type": lib.KVM_XEN_ATTR_TYPE_SHARED_INFO, "u": {"shared_info": {"gfn": 3}}}
    guest.vm.xen_set_attr(shared)
    guest.vcpu.xen_set_attr({"type": lib.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, "u": {"gpa": 0x5000}})
    guest.vm.xen_send_event(3, 0)
    # shared_info: 32 vcpu_info of 64 bytes, then the pending bits.
    assert int.from_bytes(guest.memory[0x3000 + 2048 : 0x3000 + 2056], "little") == 1 << 3
    assert bytes(guest.memory[0x5000:0x5001]) == b"\1"  # evtchn_upcall_pending


@pytest.mark.refused("KVM_XEN_HVM_CONFIG", "KVM_XEN_HVM_EVTCHN_SEND", "KVM_HYPERV_EVENTFD")
def test_bad_requests_of_other_hypervisors_are_refused(vm: KvmVm) -> None:
    answers = set()
    for attempt in (
        lambda: vm.xen_hvm_config({"flags": 0xFFFF0000}),
        lambda: vm.xen_send_event(1, 99),
        lambda: vm.hyperv_eventfd(1 << 30, 0),
        lambda: vm.xen_get_attr(0x777),
    ):
        with pytest.raises(IoctlError) as caught:
            attempt()
        answers.add(caught.value.errno)
    # ENOTTY without Xen in this KVM; with it, ENOENT for an unknown attribute.
    assert answers <= {errno.ENOTTY, errno.EINVAL, errno.ENOENT}


def test_a_route_prints_as_a_person_would_write_it() -> None:
    table = Struct("kvm_irq_routing", entries=[msi_route(24, MSI_ADDRESS, 0x31)])
    assert "msi=kvm_irq_routing_msi(address_lo=0xfee00000" in repr(table)
    assert "gsi=24" in repr(table)
