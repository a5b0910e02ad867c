"""The kvm engine with a PC's interrupt hardware: both PICs, I/O APIC, local APICs, PIT.

All of that is in the kernel. Application processors wait there for INIT and SIPI, and a
halted processor waits there for an interrupt: ``hlt`` causes no exit.
"""

from __future__ import annotations

import struct
from typing import Any

from kvmhost.boot.firmware import GDT_BYTES, GDT_GPA
from kvmhost.boot.pcboot import Mode, PcEntry
from kvmhost.devices.bus import Bus
from kvmhost.engine.base import Vcpu
from kvmhost.engine.cpumodel import MCG_CAP, firmware_msrs, pc_cpuid
from kvmhost.engine.kvm import KvmEngine
from kvmhost.kvm import KvmVcpu
from kvmhost.kvm.vm_irq import irqchip_route
from kvmhost.memory.guest import GuestMemory
from kvmhost.memory.pclayout import IDENTITY_MAP_GPA, KVM_TSS_GPA

__all__ = ["MP_HALTED", "MP_RUNNABLE", "MP_STATES", "KvmPcEngine"]

#: ``struct kvm_mp_state`` by number.
MP_STATES = {
    0: "running",
    1: "waits for INIT",
    2: "waits for SIPI",
    3: "halted",
    4: "got SIPI",
}
MP_RUNNABLE, MP_HALTED = 0, 3

_PIC_MASTER, _PIC_SLAVE, _IO_APIC = 0, 1, 2
_N_GSIS = 24


_CR0_PE, _CR0_ET, _CR0_PG = 1, 1 << 4, 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
#: Firmware's choice: timer, keyboard and cascade are unmasked; on the second PIC the clock.
_PIC_STATES = {_PIC_MASTER: (0x08, 0xB8, 0x00), _PIC_SLAVE: (0x70, 0x8E, 0x0C)}
#: Spurious vector and enable; LINT0 is the PIC, LINT1 is NMI.
_LAPIC_STATE = {0xF0: 0x1FF, 0x350: 0x8700, 0x360: 0x8400}


class KvmPcEngine(KvmEngine):
    """A VM with an in-kernel irqchip.

    :param cpu: the processor model, see :mod:`kvmhost.engine.cpumodel`
    :raises CapabilityError: if /dev/kvm cannot be used here
    """

    def __init__(self, cpu: str = "plain") -> None:
        super().__init__()
        self._cpu_model = cpu
        self._low_end = 0

    def attach(self, memory: GuestMemory, bus: Bus) -> None:
        """Create the memslots and the board; once, before any vCPU."""
        super().attach(memory, bus)
        self._low_end = memory.regions[0].end
        self.vm.set_tss_addr(KVM_TSS_GPA)
        self.vm.set_identity_map_addr(IDENTITY_MAP_GPA)
        self.vm.create_irqchip()
        self.vm.create_pit2(speaker=True)
        self._route_lines()

    def create_processor(self, index: int, n_vcpus: int, entry: PcEntry, cr3: int) -> Vcpu:
        """Create a processor; the first one starts at ``entry``, the others wait.

        :param cr3: root of the page tables, for a 64-bit entry
        """
        core, vcpu = self._create_core(index)
        cpuid = pc_cpuid(bytes(self._supported_cpuid()), index, n_vcpus, self._cpu_model)
        core.set_cpuid(cpuid)
        core.set_msrs(firmware_msrs(cpuid, self._low_end))
        core.setup_mce(MCG_CAP & (self._system.mce_cap_supported() | 0xFF))
        if index == 0:
            _enter(core, entry, cr3)
        return vcpu

    def set_up_interrupts(self) -> None:
        """Initialize the interrupt hardware as firmware does.

        PICs at vectors 0x08 and 0x70 with most lines masked, the PIT ticking 18.2 times
        a second, and the first local APIC in virtual wire mode.
        """
        for number, (base, mask, elcr) in _PIC_STATES.items():
            state = self.vm.get_irqchip(number)
            pic = state.chip.pic
            pic.imr, pic.irq_base, pic.elcr = mask, base, elcr
            self.vm.set_irqchip(state)
        pit = self.vm.get_pit2()
        pit.channels[0].update(
            count=0x10000, rw_mode=3, read_state=3, write_state=3, write_latch=0, mode=2, gate=1
        )
        self.vm.set_pit2(pit)
        lapic = self.cores[0].get_lapic()
        for register, value in _LAPIC_STATE.items():
            struct.pack_into("<I", lapic.raw(), register, value)
        self.cores[0].set_lapic(lapic)

    def set_line(self, irq: int, level: bool) -> None:
        """Raise or lower an interrupt line of the board. Source: KVM_IRQ_LINE."""
        self.vm.irq_line(irq, int(level))

    def mp_state(self, index: int) -> int:
        """Return the state of a processor, a key of :data:`MP_STATES`."""
        return self.cores[index].get_mp_state()

    def interrupts_open(self, index: int) -> bool:
        """Return whether a processor accepts maskable interrupts."""
        return bool(self.cores[index].get_regs().rflags & 0x200)

    def _route_lines(self) -> None:
        """Lines 0 to 15 to the PICs, all to the I/O APIC; the PIT is at input 2 there."""
        routes = []
        for gsi in range(_N_GSIS):
            if gsi < 16:
                routes.append(irqchip_route(gsi, gsi // 8, gsi % 8))
            if gsi != 2:
                routes.append(irqchip_route(gsi, _IO_APIC, 2 if gsi == 0 else gsi))
        self.vm.set_gsi_routing(routes)


def _enter(vcpu: KvmVcpu, entry: PcEntry, cr3: int) -> None:
    sregs = vcpu.get_sregs()
    if entry.mode is Mode.REAL:
        for segment in (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
            segment.update(base=0, selector=0)
    else:
        is_long = entry.mode is Mode.LONG
        # Descriptors as they are in the table, so that reloading a selector works.
        _flat(sregs.cs, 0x28 if is_long else 0x08, 11, not is_long, is_long)
        for segment in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
            _flat(segment, 0x10, 3, True, False)
        sregs.gdt.base, sregs.gdt.limit = GDT_GPA, GDT_BYTES - 1
        sregs.cr0 = _CR0_PE | _CR0_ET | (_CR0_PG if is_long else 0)
        if is_long:
            sregs.cr3, sregs.cr4, sregs.efer = cr3, _CR4_PAE, _EFER_LME | _EFER_LMA
    sregs.idt.base, sregs.idt.limit = 0, 0x3FF
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rsp, regs.rflags = entry.rip, entry.rsp, 2
    regs.rax, regs.rbx, regs.rdx, regs.rsi = entry.rax, entry.rbx, entry.rdx, entry.rsi
    vcpu.set_regs(regs)


def _flat(segment: Any, selector: int, kind: int, is_32: bool, is_64: bool) -> None:
    fields = {"base": 0, "limit": 0xFFFFFFFF, "selector": selector, "type": kind}
    fields |= {"present": 1, "dpl": 0, "s": 1, "g": 1, "db": int(is_32), "l": int(is_64)}
    segment.update(**fields)
