/*
 * Timer interrupts: the PIT through the 8259 and through the I/O APIC, the local
 * APIC's timer one-shot and periodic, and the ACPI timer that only counts up.
 */
#define OWN_HANDLER
#include "main.h"

static struct gate idt[256];
static volatile u32 got[256];

void handle(u32 vector)
{
	got[vector]++;
	if (vector < 0x30)
		out8(0x20, 0x20);
	else
		eoi();
}

static void remap_pics(void)
{
	out8(0x20, 0x11);
	out8(0xa0, 0x11);
	out8(0x21, 0x20);
	out8(0xa1, 0x28);
	out8(0x21, 4);
	out8(0xa1, 2);
	out8(0x21, 1);
	out8(0xa1, 1);
	out8(0x21, 0xfe);
	out8(0xa1, 0xff);
}

static void pit_periodic(u16 divisor)
{
	out8(0x43, 0x34);
	out8(0x40, (u8)divisor);
	out8(0x40, divisor >> 8);
}

static void ioapic(u32 index, u32 value)
{
	write32(0xfec00000, index);
	write32(0xfec00010, value);
}

static void wait(u32 vector, u32 count)
{
	while (got[vector] < count)
		sti_hlt();
	cli();
}

u32 main(u32 magic, struct mb_info *info)
{
	(void)magic;
	(void)info;
	load_idt(idt);
	remap_pics();
	pit_periodic(11932);	/* 10 ms */
	wait(0x20, 5);
	print("pit through the pic\n");
	out8(0x21, 0xff);
	enable_apic();
	ioapic(0x10 + 2 * 2, 0x50);	/* input 2, fixed, edge, vector 0x50 */
	ioapic(0x11 + 2 * 2, apic_id() << 24);
	wait(0x50, 5);
	print("pit through the i/o apic\n");
	ioapic(0x10 + 2 * 2, 0x10000);
	write32(APIC + APIC_TIMER_DIVIDE, 0xb);
	write32(APIC + APIC_LVT_TIMER, 0x60);
	write32(APIC + APIC_TIMER_INITIAL, 1000000);
	wait(0x60, 1);
	show("one shot, left", read32(APIC + APIC_TIMER_CURRENT));
	write32(APIC + APIC_LVT_TIMER, 0x20061);
	write32(APIC + APIC_TIMER_INITIAL, 3000000);
	wait(0x61, 4);
	write32(APIC + APIC_TIMER_INITIAL, 0);
	print("periodic\n");
	return got[0x60] == 1 ? 0 : 1;
}
