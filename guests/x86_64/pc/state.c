/*
 * The state that the boot protocol sets up: control registers, selectors, flags,
 * PICs, local APIC, I/O APIC, and the identification of this processor.
 */
#include "main.h"

u32 main(u32 magic, struct mb_info *info)
{
	u32 cr0, cr4, flags, leaf[4];

	(void)magic;
	(void)info;
	asm volatile("mov %%cr0, %0" : "=r"(cr0));
	asm volatile("mov %%cr4, %0" : "=r"(cr4));
	asm volatile("pushf; pop %0" : "=r"(flags));
	show("cr0", cr0);
	show("cr4", cr4);
	show("interrupts on", flags & 0x200);
	show("pic masks", (u32)(in8(0xa1) << 8 | in8(0x21)));
	show("elcr", (u32)(in8(0x4d1) << 8 | in8(0x4d0)));
	show("apic base", rdmsr(0x1b));
	show("apic id", read32(APIC + APIC_ID));
	show("apic version", read32(APIC + 0x30));
	show("spurious", read32(APIC + APIC_SVR));
	show("lint0", read32(APIC + 0x350));
	show("lint1", read32(APIC + 0x360));
	show("timer", read32(APIC + APIC_LVT_TIMER));
	write32(0xfec00000, 0);
	show("i/o apic id", read32(0xfec00010));
	write32(0xfec00000, 1);
	show("i/o apic version", read32(0xfec00010));
	write32(0xfec00000, 0x14);
	show("i/o apic input 2", read32(0xfec00010));
	cpuid(1, 0, leaf);
	show("leaf 1 id and count", leaf[1] >> 16);
	show("hypervisor", leaf[2] >> 31);
	cpuid(0xb, 1, leaf);
	show("leaf b level", leaf[2]);
	show("  processors", leaf[1]);
	cpuid(0x40000000, 0, leaf);
	show("hypervisor leaf", leaf[1]);
	show("com1 in the data area", *(u16 *)low(0x400));
	show("ebda", *(u16 *)low(0x40e));
	show("kib", *(u16 *)low(0x413));
	return 0;
}
