"""The state of a vCPU: what is set is what the guest finds, and the other way round."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import Any

import pytest

from kvmhost._ffi import lib
from kvmhost.errors import IoctlError, LayoutError
from kvmhost.exits import Hlt, IoOut
from kvmhost.kvm import Cap, KvmVm, Struct, System

pytestmark = pytest.mark.requires_kvm

Maker = Callable[..., Any]

SYSENTER_CS, TSC, KVM_ASYNC_PF_INT = 0x174, 0x10, 0x4B564D06
# out 0x80, eax (in 16-bit code)
OUT = bytes.fromhex("66 e7 80")


@pytest.mark.covers("KVM_GET_REGS", "KVM_SET_REGS", "KVM_RUN")
def test_regs_reach_the_guest_and_back(tiny: Maker) -> None:
    # add eax, ebx; hlt
    guest = tiny(bytes.fromhex("66 01 d8 f4"))
    regs = guest.vcpu.get_regs()
    regs.update(rax=0x1234, rbx=0x4321)
    guest.vcpu.set_regs(regs)
    assert guest.run() == Hlt()
    assert guest.vcpu.get_regs().rax == 0x5555


@pytest.mark.covers("KVM_GET_SREGS", "KVM_SET_SREGS")
def test_segment_bases_are_where_the_guest_runs(tiny: Maker) -> None:
    guest = tiny(b"\xf4")
    # mov ax, cs; out 0x80, eax
    guest.memory[0x3000:0x3005] = bytes.fromhex("8c c8") + OUT
    sregs = guest.vcpu.get_sregs()
    sregs.cs.update(base=0x3000, selector=0x300)
    guest.vcpu.set_sregs(sregs)
    guest.vcpu.set_regs({"rip": 0, "rflags": 2})
    assert guest.out() == 0x300


def test_an_impossible_state_is_refused(tiny: Maker) -> None:
    guest = tiny(b"\xf4")
    sregs = guest.vcpu.get_sregs()
    sregs.update(cr0=sregs.cr0 | 1 << 31, efer=1 << 8)  # paging without protection
    with pytest.raises(IoctlError, match="cr0=0x") as caught:
        guest.vcpu.set_sregs(sregs)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.requires_cap("SREGS2")
@pytest.mark.covers("KVM_GET_SREGS2", "KVM_SET_SREGS2")
def test_sregs2_carry_the_pdptrs(tiny: Maker) -> None:
    guest = tiny(b"\xf4")
    sregs = guest.vcpu.get_sregs2()
    # 32-bit PAE paging: PE and PG, CR4.PAE; four PDPTRs, present.
    sregs.update(cr0=sregs.cr0 | 1 | 1 << 31, cr4=1 << 5, cr3=0x4000)
    sregs.update(flags=lib.KVM_SREGS2_FLAGS_PDPTRS_VALID, pdptrs=[0x5001, 0x6001, 0x7001, 0])
    guest.vcpu.set_sregs2(sregs)
    found = guest.vcpu.get_sregs2()
    assert guest.vcpu.get_sregs().cr3 == found.cr3 == 0x4000
    # A KVM that runs no 32-bit paging drops CR0.PG, and with it the PDPTRs.
    paging = bool(found.cr0 >> 31)
    assert found.flags == (lib.KVM_SREGS2_FLAGS_PDPTRS_VALID if paging else 0)
    assert found.pdptrs == ([0x5001, 0x6001, 0x7001, 0] if paging else [0, 0, 0, 0])


@pytest.mark.requires_cap("DEBUGREGS")
@pytest.mark.covers("KVM_GET_DEBUGREGS", "KVM_SET_DEBUGREGS")
def test_debug_registers_reach_the_guest_and_back(tiny: Maker) -> None:
    # mov eax, dr0; mov dr1, eax; hlt
    guest = tiny(bytes.fromhex("0f 21 c0 0f 23 c8 f4"))
    debugregs = guest.vcpu.get_debugregs()
    debugregs.db[0] = 0xABCD
    guest.vcpu.set_debugregs(debugregs)
    assert guest.run() == Hlt()
    assert guest.vcpu.get_debugregs().db == [0xABCD, 0xABCD, 0, 0]


@pytest.mark.requires_cap("XSAVE")
@pytest.mark.covers("KVM_GET_FPU", "KVM_SET_FPU", "KVM_GET_XSAVE", "KVM_SET_XSAVE")
def test_fpu_and_xsave_are_two_views_of_the_same_registers(tiny: Maker) -> None:
    vcpu = tiny(b"\xf4").vcpu
    area = vcpu.get_xsave()
    # XMM registers are at offset 160 of the legacy area (Intel SDM vol. 1, 10.5.1).
    area.raw()[160 : 160 + 16] = b"\xa5" * 16
    area.region[128] |= 2  # XSTATE_BV: SSE state is there
    vcpu.set_xsave(area)
    fpu = vcpu.get_fpu()
    assert fpu.xmm[0] == b"\xa5" * 16
    fpu.xmm[3].assign(list(range(16)))
    vcpu.set_fpu(fpu)
    found = bytes(vcpu.get_xsave())
    assert found[160:176] == b"\xa5" * 16
    assert found[160 + 48 : 160 + 64] == bytes(range(16))


@pytest.mark.requires_cap("XSAVE2")
@pytest.mark.covers("KVM_GET_XSAVE2")
def test_xsave2_is_as_long_as_the_vm_says(tiny: Maker) -> None:
    guest = tiny(b"\xf4")
    n_bytes = guest.vm.check_extension(Cap.XSAVE2)
    area = guest.vcpu.get_xsave2(n_bytes)
    assert len(bytes(area)) == n_bytes
    assert bytes(area)[:4096] == bytes(guest.vcpu.get_xsave())
    guest.vcpu.set_xsave(area)
    assert len(bytes(guest.vcpu.get_xsave2(0))) == 4096


@pytest.mark.requires_cap("XCRS")
@pytest.mark.covers("KVM_GET_XCRS", "KVM_SET_XCRS")
def test_xcr0_takes_what_cpuid_has(tiny: Maker) -> None:
    vcpu = tiny(b"\xf4").vcpu
    xcrs = vcpu.get_xcrs()
    assert (xcrs.nr_xcrs, xcrs.xcrs[0].value) == (1, 1)
    xcrs.xcrs[0].value = 3
    vcpu.set_xcrs(xcrs)
    assert vcpu.get_xcrs().xcrs[0].value == 3
    xcrs.xcrs[0].value = 1 << 62
    with pytest.raises(IoctlError) as caught:
        vcpu.set_xcrs(xcrs)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.covers("KVM_SET_CPUID2", "KVM_GET_CPUID2", "KVM_GET_SUPPORTED_CPUID")
def test_the_guest_reads_the_cpuid_that_was_set(tiny: Maker, system: System) -> None:
    # mov eax, 0x40000000; cpuid; mov eax, ebx; out 0x80, eax
    guest = tiny(bytes.fromhex("66 b8 00 00 00 40 0f a2 66 89 d8") + OUT)
    table = system.supported_cpuid()
    leaf = next(entry for entry in table.entries if entry.function == 0x40000000)
    assert leaf.ebx == int.from_bytes(b"KVMK", "little")  # "KVMKVMKVM"
    leaf.ebx = 0x12345678
    guest.vcpu.set_cpuid(table)
    found = guest.vcpu.get_cpuid()
    assert [e.ebx for e in found.entries if e.function == 0x40000000] == [0x12345678]
    assert guest.out() == 0x12345678


@pytest.mark.covers("KVM_SET_CPUID")
def test_the_old_form_of_cpuid(tiny: Maker) -> None:
    # mov eax, 2; cpuid; out 0x80, eax
    guest = tiny(bytes.fromhex("66 b8 02 00 00 00 0f a2") + OUT)
    entries = [{"function": 0, "eax": 7}, {"function": 2, "eax": 0x55AA}]
    guest.vcpu.set_cpuid1({"entries": entries})
    assert guest.out() == 0x55AA


@pytest.mark.covers("KVM_GET_MSRS", "KVM_SET_MSRS")
def test_msrs_reach_the_guest_and_back(tiny: Maker) -> None:
    # mov ecx, 0x174; rdmsr; out 0x80, eax; inc eax; wrmsr; hlt
    guest = tiny(bytes.fromhex("66 b9 74 01 00 00 0f 32") + OUT + bytes.fromhex("66 40 0f 30 f4"))
    guest.vcpu.set_msrs({SYSENTER_CS: 0x1230})
    assert guest.out() == 0x1230
    assert guest.run() == Hlt()
    assert guest.vcpu.get_msrs([SYSENTER_CS]) == {SYSENTER_CS: 0x1231}


def test_the_first_refused_msr_is_named(tiny: Maker) -> None:
    vcpu = tiny(b"\xf4").vcpu
    with pytest.raises(IoctlError, match=r"index=0x99999, data=0x7") as caught:
        vcpu.set_msrs({SYSENTER_CS: 0x40, 0x99999: 7, TSC: 1})
    assert caught.value.errno == errno.EIO
    assert vcpu.get_msrs([SYSENTER_CS, 0x99999, TSC]) == {SYSENTER_CS: 0x40}


@pytest.mark.covers("KVM_GET_MSR_INDEX_LIST")
def test_every_listed_msr_can_be_saved(tiny: Maker, system: System) -> None:
    listed = system.msr_index_list()
    assert {SYSENTER_CS, TSC} <= set(listed)
    saved = tiny(b"\xf4").vcpu.get_msrs(listed)
    assert list(saved) == listed
    saved[SYSENTER_CS] = 0x150
    # Linux 6.18 lists it and refuses to set it without local APICs in the kernel.
    saved.pop(KVM_ASYNC_PF_INT, None)
    fresh = tiny(b"\xf4").vcpu
    fresh.set_msrs(saved)
    assert fresh.get_msrs([SYSENTER_CS]) == {SYSENTER_CS: 0x150}


@pytest.mark.requires_cap("VCPU_ATTRIBUTES")
@pytest.mark.covers("KVM_HAS_DEVICE_ATTR", "KVM_GET_DEVICE_ATTR", "KVM_SET_DEVICE_ATTR")
def test_tsc_offset_is_an_attribute(tiny: Maker) -> None:
    vcpu = tiny(b"\xf4").vcpu
    assert vcpu.has_attr(lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET)
    assert not vcpu.has_attr(lib.KVM_VCPU_TSC_CTRL, 77)
    with pytest.raises(IoctlError) as caught:
        vcpu.get_attr(lib.KVM_VCPU_TSC_CTRL, 77)
    assert caught.value.errno == errno.ENXIO
    vcpu.set_tsc_offset(vcpu.get_tsc_offset())


@pytest.mark.requires_cap("TSC_CONTROL")
@pytest.mark.requires_cap("VCPU_ATTRIBUTES")
def test_tsc_offset_moves_what_the_guest_reads(tiny: Maker) -> None:
    # rdtsc; mov eax, edx; out 0x80, eax
    guest = tiny(bytes.fromhex("0f 31 66 89 d0") + OUT)
    before = guest.vcpu.get_tsc_offset()
    guest.vcpu.set_tsc_offset(before + (1 << 60))
    assert guest.vcpu.get_tsc_offset() == (before + (1 << 60)) % (1 << 64)
    assert guest.out() >> 28 == 1


@pytest.mark.requires_cap("GET_TSC_KHZ")
@pytest.mark.covers("KVM_GET_TSC_KHZ", "KVM_SET_TSC_KHZ")
def test_tsc_frequency(tiny: Maker) -> None:
    guest = tiny(b"\xf4")
    khz = guest.vcpu.get_tsc_khz()
    assert 100_000 < khz < 10_000_000
    assert guest.vm.get_tsc_khz() == khz
    guest.vcpu.set_tsc_khz(khz)
    assert guest.vcpu.get_tsc_khz() == khz


@pytest.mark.requires_cap("VM_TSC_CONTROL")
@pytest.mark.covers("KVM_SET_TSC_KHZ")
def test_tsc_frequency_of_new_vcpus(vm: KvmVm) -> None:
    khz = vm.get_tsc_khz()
    vm.set_tsc_khz(khz)
    with vm.create_vcpu(0) as vcpu:
        assert vcpu.get_tsc_khz() == khz


@pytest.mark.requires_cap("ONE_REG")
@pytest.mark.covers("KVM_GET_ONE_REG", "KVM_SET_ONE_REG", "KVM_GET_REG_LIST")
def test_an_msr_as_one_reg(tiny: Maker) -> None:
    vcpu = tiny(b"\xf4").vcpu
    # KVM_REG_X86 | KVM_REG_SIZE_U64, kind 2 (MSR) in bits 32 to 39.
    register = 0x2030_0002_0000_0000 | SYSENTER_CS
    vcpu.set_one_reg(register, 0x77)
    assert vcpu.get_one_reg(register) == 0x77
    assert vcpu.get_msrs([SYSENTER_CS]) == {SYSENTER_CS: 0x77}
    for listed in vcpu.reg_list():
        vcpu.set_one_reg(listed, vcpu.get_one_reg(listed))


@pytest.mark.requires_cap("VCPU_EVENTS")
@pytest.mark.covers("KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS")
def test_an_nmi_set_as_pending_is_taken(tiny: Maker) -> None:
    guest = tiny(b"\xf4")
    guest.vector(2, OUT)
    events = guest.vcpu.get_vcpu_events()
    assert events.nmi.pending == 0
    events.nmi.pending = 1
    events.flags |= lib.KVM_VCPUEVENT_VALID_NMI_PENDING
    guest.vcpu.set_vcpu_events(events)
    assert guest.vcpu.get_vcpu_events().nmi.pending == 1
    guest.vcpu.set_regs({"rip": 0x1000, "rsp": 0x8000, "rflags": 2, "rax": 99})
    assert guest.out() == 99
    assert guest.vcpu.get_vcpu_events().nmi.masked == 1


@pytest.mark.requires_cap("MCE")
@pytest.mark.covers("KVM_X86_SETUP_MCE", "KVM_X86_SET_MCE", "KVM_X86_GET_MCE_CAP_SUPPORTED")
def test_machine_check_banks(tiny: Maker, system: System) -> None:
    # mov ecx, 0x179; rdmsr; out 0x80, eax
    guest = tiny(bytes.fromhex("66 b9 79 01 00 00 0f 32") + OUT)
    cap = system.mce_cap_supported() & ~0xFF | 4
    guest.vcpu.setup_mce(cap)
    # AMD has nothing above bit 8, so KVM drops the rest there.
    assert guest.out() in (cap & 0xFFFFFFFF, cap & 0x1FF)
    status = 1 << 63 | 0x123  # valid, corrected
    guest.vcpu.set_mce(1, status, addr=0x4000)
    # IA32_MC1_STATUS and IA32_MC1_ADDR
    assert guest.vcpu.get_msrs([0x405, 0x406]) == {0x405: status, 0x406: 0x4000}
    with pytest.raises(IoctlError):
        guest.vcpu.set_mce(4, status)


@pytest.mark.requires_cap("IRQCHIP")
@pytest.mark.covers("KVM_GET_LAPIC", "KVM_SET_LAPIC")
def test_the_guest_reads_the_local_apic_that_was_set(tiny: Maker) -> None:
    # mov eax, [0xfee000f0]; out 0x80, eax
    guest = tiny(bytes.fromhex("67 66 a1 f0 00 e0 fe") + OUT, KvmVm.create_irqchip)
    lapic = guest.vcpu.get_lapic()
    registers = lapic.regs.raw().cast("I")
    assert registers[0xF0 // 4] == 0xFF
    registers[0xF0 // 4] = 0x1F7  # spurious vector 0xf7, enabled
    guest.vcpu.set_lapic(lapic)
    assert guest.out() == 0x1F7


@pytest.mark.requires_cap("MP_STATE")
@pytest.mark.covers("KVM_GET_MP_STATE", "KVM_SET_MP_STATE")
def test_a_waiting_processor_is_made_to_run(tiny: Maker) -> None:
    guest = tiny(bytes.fromhex("66 b8 05 00 00 00") + OUT, KvmVm.create_irqchip)
    second = guest.add_vcpu(1)
    guest.vcpus.append(second)
    assert guest.vcpu.get_mp_state() == lib.KVM_MP_STATE_RUNNABLE
    assert second.get_mp_state() == lib.KVM_MP_STATE_UNINITIALIZED
    second.set_mp_state(lib.KVM_MP_STATE_RUNNABLE)
    vm_exit = second.run()
    assert isinstance(vm_exit, IoOut)
    assert vm_exit.value == 5


@pytest.mark.requires_cap("IRQCHIP")
@pytest.mark.covers("KVM_SET_BOOT_CPU_ID")
def test_the_boot_cpu_is_the_one_that_runs(vm: KvmVm) -> None:
    vm.create_irqchip()
    vm.set_boot_cpu_id(1)
    with vm.create_vcpu(0) as first, vm.create_vcpu(1) as second:
        assert first.get_mp_state() == lib.KVM_MP_STATE_UNINITIALIZED
        assert second.get_mp_state() == lib.KVM_MP_STATE_RUNNABLE
        with pytest.raises(IoctlError) as caught:
            vm.set_boot_cpu_id(0)
        assert caught.value.errno == errno.EBUSY


@pytest.mark.requires_cap("NESTED_STATE")
@pytest.mark.covers("KVM_GET_NESTED_STATE", "KVM_SET_NESTED_STATE")
def test_nested_state_round_trip(tiny: Maker) -> None:
    guest = tiny(b"\xf4")
    state = guest.vcpu.get_nested_state(guest.vm.check_extension(Cap.NESTED_STATE))
    guest.vcpu.set_nested_state(state)
    assert Struct.from_bytes("kvm_nested_state", state[:128]).size == len(state)


@pytest.mark.refused("KVM_GET_NESTED_STATE", "KVM_SET_NESTED_STATE")
def test_nested_state_of_no_kind_is_refused(tiny: Maker) -> None:
    vcpu = tiny(b"\xf4").vcpu
    # flags, format, size: a format that there is not.
    with pytest.raises(IoctlError) as caught:
        vcpu.set_nested_state(struct.pack("<HHI", 0, 0xFFFF, 128).ljust(128, b"\xff"))
    assert caught.value.errno == errno.EINVAL


def test_sizes_that_go_beyond_a_buffer_are_refused(tiny: Maker) -> None:
    vcpu = tiny(b"\xf4").vcpu
    for n_bytes, said in ((128, 1 << 20), (128, 64), (4, 128)):
        state = struct.pack("<HHI", 0, 0, said).ljust(128, b"\0")[:n_bytes]
        with pytest.raises(LayoutError, match="its header says"):
            vcpu.set_nested_state(state)
    wide = 0x2030_0002_0000_0000 | 4 << 52  # KVM_REG_SIZE_U128
    for call in (lambda: vcpu.get_one_reg(wide), lambda: vcpu.set_one_reg(wide, 0)):
        with pytest.raises(LayoutError, match="need 8 or less"):
            call()
