"""Running: debugging, exits that were asked for, registers in the run page, signals."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from processor import processor_is_emulated

from kvmhost._ffi import ffi, lib
from kvmhost.errors import IoctlError, LayoutError, StateError
from kvmhost.exits import Debug, Hlt, Hypercall, IoOut, Kicked, MsrRead, MsrWrite, SystemEvent
from kvmhost.guests import image_path
from kvmhost.kvm import Cap, KvmVcpu, KvmVm, System
from kvmhost.kvm.exits import decode
from kvmhost.kvm.filters import MsrRange
from kvmhost.machine import Machine

pytestmark = pytest.mark.requires_kvm

Maker = Callable[..., Any]

SYSENTER_CS, KVM_SYSTEM_TIME_NEW, KVM_STEAL_TIME = 0x174, 0x4B564D01, 0x4B564D03
OUT = bytes.fromhex("66 e7 80")  # out 0x80, eax (16-bit code)
OUT64 = bytes.fromhex("e7 80")  # the same in 64-bit code
RDMSR = bytes.fromhex("66 b9 74 01 00 00 0f 32")  # mov ecx, 0x174; rdmsr
WRMSR = bytes.fromhex("66 b9 74 01 00 00 0f 30")


@pytest.fixture
def user() -> Iterator[Callable[[bytes], tuple[Machine, KvmVcpu, int]]]:
    """Return a maker of guests at privilege level 3, in 64-bit mode, with code of the test."""
    machines: list[Machine] = []

    def make(code: bytes) -> tuple[Machine, KvmVcpu, int]:
        machine = Machine(image_path("hello"), mem_bytes=4 << 20, engine="kvm")
        machines.append(machine)
        vcpu: KvmVcpu = machine.engine.cores[0]  # type: ignore[attr-defined]
        entry = vcpu.get_regs().rip
        machine.memory[entry : entry + len(code)] = code
        return machine, vcpu, entry

    yield make
    for machine in machines:
        machine.close()


# nop; inc eax; inc eax; out 0x80, eax; hlt: instructions at 0, 1, 3, 5, 8
COUNTING = bytes.fromhex("90 66 40 66 40") + OUT + b"\xf4"


@pytest.mark.requires_cap("SET_GUEST_DEBUG")
@pytest.mark.covers("KVM_SET_GUEST_DEBUG")
def test_single_steps(tiny: Maker) -> None:
    guest = tiny(COUNTING)
    guest.vcpu.single_step()
    steps = [guest.run() for _ in range(3)]
    assert [step.pc for step in steps if isinstance(step, Debug)] == [0x1001, 0x1003, 0x1005]
    assert all(isinstance(step, Debug) and step.dr6 & 1 << 14 for step in steps)
    guest.vcpu.single_step(False)
    assert guest.out() == 2
    assert guest.run() == Hlt()


@pytest.mark.requires_cap("SET_GUEST_DEBUG")
@pytest.mark.covers("KVM_SET_GUEST_DEBUG")
def test_a_hardware_breakpoint_stops_before_the_instruction(tiny: Maker) -> None:
    guest = tiny(COUNTING)
    control = lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_USE_HW_BP
    guest.vcpu.set_guest_debug(control, [0, 0x1003])
    stop = guest.run()
    if processor_is_emulated() and isinstance(stop, IoOut):
        pytest.skip("QEMU's VMRUN loads no breakpoint registers; run on a real processor")
    assert isinstance(stop, Debug)
    assert (stop.exception, stop.pc, stop.dr6 & 0xF) == (1, 0x1003, 2)
    assert guest.vcpu.get_regs().rax == 1
    guest.vcpu.set_guest_debug(0)
    assert guest.out() == 2
    with pytest.raises(LayoutError, match="at most 4"):
        guest.vcpu.set_guest_debug(control, [1, 2, 3, 4, 5])


@pytest.mark.requires_cap("SET_GUEST_DEBUG2")
@pytest.mark.covers("KVM_SET_GUEST_DEBUG")
def test_a_breakpoint_instruction_comes_out(tiny: Maker) -> None:
    guest = tiny(b"\x90\xcc\xf4")
    guest.vector(3, OUT)
    assert guest.vm.check_extension(Cap.SET_GUEST_DEBUG2) & lib.KVM_GUESTDBG_USE_SW_BP
    guest.vcpu.set_guest_debug(lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_USE_SW_BP)
    stop = guest.run()
    if isinstance(stop, IoOut):
        pytest.skip("KVM_CAP_SET_GUEST_DEBUG2 has USE_SW_BP, but level-0 code is emulated here")
    assert isinstance(stop, Debug)
    assert (stop.exception, stop.pc) == (3, 0x1001)


@pytest.mark.covers("KVM_TRANSLATE")
def test_addresses_go_through_the_tables_of_the_guest(user: Maker) -> None:
    _, vcpu, entry = user(b"\x90")
    assert vcpu.translate(entry + 5) == entry + 5  # mapped one to one
    assert vcpu.translate(0) is None


@pytest.mark.requires_cap("SYNC_REGS")
@pytest.mark.covers("KVM_RUN")
def test_registers_in_the_run_page(tiny: Maker) -> None:
    guest = tiny(OUT + bytes.fromhex("66 01 d8") + OUT)  # out; add eax, ebx; out
    guest.vcpu.sync_registers(lib.KVM_SYNC_X86_REGS | lib.KVM_SYNC_X86_SREGS)
    guest.out()
    page = guest.vcpu.run_page
    assert page.s.regs.regs.to_dict() == guest.vcpu.get_regs().to_dict()
    assert page.s.regs.sregs.cr0 == guest.vcpu.get_sregs().cr0
    page.s.regs.regs.update(rax=40, rbx=2)
    page.kvm_dirty_regs = lib.KVM_SYNC_X86_REGS
    assert guest.out() == 42
    guest.vcpu.sync_registers(1 << 20)
    with pytest.raises(IoctlError) as caught:
        guest.run()
    assert caught.value.errno == errno.EINVAL


def test_the_run_page_goes_with_the_vcpu(vm: KvmVm) -> None:
    vcpu = vm.create_vcpu(0)
    page = vcpu.run_page
    page.cr8 = 5
    vcpu.close()
    assert page.cr8 == 5  # a view that is kept keeps the mapping
    with pytest.raises(StateError, match="vCPU 0 is closed"):
        _ = vcpu.run_page


@pytest.mark.requires_cap("X86_MSR_FILTER")
@pytest.mark.covers("KVM_X86_SET_MSR_FILTER", "KVM_ENABLE_CAP")
def test_filtered_msrs_become_exits(tiny: Maker) -> None:
    guest = tiny(RDMSR + OUT + WRMSR + OUT + WRMSR)
    guest.vector(13, b"\xf4")  # #GP: halt
    guest.vm.exit_on_msrs(lib.KVM_MSR_EXIT_REASON_FILTER)
    guest.vm.set_msr_filter([MsrRange.refuse(SYSENTER_CS)])
    assert guest.run() == MsrRead(SYSENTER_CS, lib.KVM_MSR_EXIT_REASON_FILTER)
    guest.vcpu.complete_msr(77)
    assert guest.out() == 77
    assert guest.run() == MsrWrite(SYSENTER_CS, 77, lib.KVM_MSR_EXIT_REASON_FILTER)
    guest.vcpu.complete_msr()
    assert guest.out() == 77
    assert isinstance(guest.run(), MsrWrite)
    guest.vcpu.complete_msr(error=True)
    assert guest.run() == Hlt()
    guest.vm.set_msr_filter([])
    assert guest.vcpu.get_msrs([SYSENTER_CS]) == {SYSENTER_CS: 0}


@pytest.mark.requires_cap("X86_USER_SPACE_MSR")
def test_unknown_msrs_become_exits(tiny: Maker) -> None:
    guest = tiny(bytes.fromhex("66 b9 99 99 09 00 0f 32") + OUT)
    guest.vm.exit_on_msrs(lib.KVM_MSR_EXIT_REASON_UNKNOWN)
    assert guest.run() == MsrRead(0x99999, lib.KVM_MSR_EXIT_REASON_UNKNOWN)
    guest.vcpu.complete_msr(1 << 32 | 6)
    assert guest.out() == 6
    with pytest.raises(IoctlError) as caught:
        guest.vm.exit_on_msrs(1 << 30)
    assert caught.value.errno == errno.EINVAL


def test_bad_msr_filters_are_refused(vm: KvmVm) -> None:
    with pytest.raises(LayoutError, match="17 MSR ranges"):
        vm.set_msr_filter([MsrRange.refuse(i) for i in range(17)])
    with pytest.raises(LayoutError, match="1 bytes for 9 bits"):
        vm.set_msr_filter([MsrRange(0, 9, b"\0")])
    assert MsrRange.allow([0x12, 0x10]) == MsrRange(0x10, 3, b"\x05")


@pytest.mark.requires_cap("EXIT_HYPERCALL")
@pytest.mark.covers("KVM_ENABLE_CAP")
def test_hypercall_exits_are_switched_on_by_number(vm: KvmVm) -> None:
    offered = vm.check_extension(Cap.EXIT_HYPERCALL)
    assert offered & 1 << 12  # KVM_HC_MAP_GPA_RANGE
    vm.enable_cap(Cap.EXIT_HYPERCALL, 1 << 12)
    with pytest.raises(IoctlError) as caught:
        vm.enable_cap(Cap.EXIT_HYPERCALL, ~offered & 0xFFFF)
    assert caught.value.errno == errno.EINVAL


def test_hypercalls_of_level_three_are_answered_without_an_exit(user: Maker) -> None:
    # mov eax, 12; vmcall or vmmcall (KVM takes both); out 0x80, eax
    for instruction in ("0f 01 c1", "0f 01 d9"):
        machine, vcpu, _ = user(bytes.fromhex("b8 0c 00 00 00" + instruction) + OUT64)
        machine.engine.vm.enable_cap(Cap.EXIT_HYPERCALL, 1 << 12)
        vm_exit = vcpu.run()
        if isinstance(vm_exit, IoOut):
            assert vm_exit.value == 0xFFFFFFFF  # -KVM_EPERM
            return
    pytest.fail("neither instruction was answered")


def test_exits_that_were_asked_for_decode() -> None:
    fields = {"reason": lib.KVM_EXIT_HYPERCALL, "detail": 12, "is_write": 1, "n_internal": 2}
    raw = ffi.new("struct kh_exit *", fields | {"internal": [5, 6]})
    assert decode(raw) == Hypercall(12, (5, 6), long_mode=True)
    fields = {"reason": lib.KVM_EXIT_SYSTEM_EVENT, "detail": 2, "n_internal": 1}
    assert decode(ffi.new("struct kh_exit *", fields)) == SystemEvent(2, (0,))


def test_a_hypercall_is_completed_in_the_run_page() -> None:
    core = ffi.new("struct kh_vcpu *")
    # SAFETY: the page lives to the end of the test, and nothing unmaps it.
    page = ffi.new("struct kvm_run *")
    core.run = page
    page.exit_reason = lib.KVM_EXIT_HYPERCALL
    lib.kh_vcpu_complete_hypercall(core, 0x55)
    # nr, six arguments, ret: behind the 32 bytes that every exit has.
    assert ffi.cast("uint64_t *", page)[4 + 7] == 0x55
    page.exit_reason = lib.KVM_EXIT_HLT
    lib.kh_vcpu_complete_hypercall(core, 0x66)
    assert ffi.cast("uint64_t *", page)[4 + 7] == 0x55


@pytest.mark.requires_cap("ENFORCE_PV_FEATURE_CPUID")
@pytest.mark.covers("KVM_ENABLE_CAP", "KVM_GET_SUPPORTED_CPUID")
def test_a_capability_of_one_vcpu(tiny: Maker, system: System) -> None:
    # mov ecx, MSR_KVM_SYSTEM_TIME_NEW; rdmsr; out 0x80, eax
    code = bytes.fromhex("66 b9 01 4d 56 4b 0f 32") + OUT
    table = system.supported_cpuid()
    for entry in table.entries:
        if entry.function == 0x40000001:
            entry.eax &= ~(1 << 3)  # no KVM_FEATURE_CLOCKSOURCE2
    for enforce in (0, 1):
        guest = tiny(code)
        guest.vector(13, b"\xf4")
        guest.vcpu.set_cpuid(table)
        guest.vcpu.enable_cap(Cap.ENFORCE_PV_FEATURE_CPUID, enforce)
        assert isinstance(guest.run(), Hlt if enforce else IoOut)


@pytest.mark.requires_cap("KVMCLOCK_CTRL")
@pytest.mark.covers("KVM_KVMCLOCK_CTRL")
def test_a_pause_is_told_to_a_guest_with_kvmclock(tiny: Maker) -> None:
    guest = tiny(OUT + OUT)
    with pytest.raises(IoctlError) as caught:
        guest.vcpu.kvmclock_ctrl()
    assert caught.value.errno == errno.EINVAL
    guest.vcpu.set_msrs({KVM_SYSTEM_TIME_NEW: 0x7000 | 1})
    guest.out()
    # struct pvclock_vcpu_time_info: flags are byte 29, bit 1 says "stopped".
    assert guest.memory[0x701D:0x701E][0] & 2 == 0
    guest.vcpu.kvmclock_ctrl()
    guest.out()
    assert guest.memory[0x701D:0x701E][0] & 2


@pytest.mark.covers("KVM_SET_SIGNAL_MASK", "KVM_RUN")
def test_a_signal_that_only_running_lets_through(tiny: Maker) -> None:
    guest = tiny(OUT + OUT)
    pending = {signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, pending)
    try:
        signal.raise_signal(signal.SIGUSR1)
        guest.out()  # blocked: it does not disturb
        guest.vcpu.set_signal_mask(set())
        assert guest.run() == Kicked()
        guest.vcpu.set_signal_mask(pending)
        guest.out()
        guest.vcpu.set_signal_mask(None)
    finally:
        signal.sigtimedwait(pending, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
