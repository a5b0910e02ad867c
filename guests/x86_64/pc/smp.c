/*
 * Starts all processors, then sends interrupts between them: one to each by APIC id,
 * a broadcast, one to itself; the receivers count. The exit value is the number of
 * processors.
 */
#define OWN_HANDLER
#define OWN_AP
#include "main.h"

static struct gate idt[256];
static volatile u32 got[256], ids[16], answers;

void handle(u32 vector)
{
	__sync_fetch_and_add(&got[vector], 1);
	if (vector == 0x41)
		ipi(0, 0x42);
	eoi();
}

void ap_main(u32 index)
{
	enable_apic();
	lidt(idt);
	ids[index] = apic_id();
	__sync_fetch_and_add(&answers, 1);
	for (;;)
		sti_hlt();
}

static void wait(volatile u32 *counter, u32 value)
{
	while (*counter < value)
		pause();
}

u32 main(u32 magic, struct mb_info *info)
{
	u32 count = cpu_count();

	(void)magic;
	(void)info;
	load_idt(idt);
	show("cpus", count);
	start_processors(count);
	wait(&answers, count - 1);
	for (u32 id = 1; id < count; id++) {
		u32 seen = 0;

		for (u32 i = 1; i < count; i++)
			seen += ids[i] == id;
		show("apic id", id);
		show("  seen", seen);
	}
	sti();
	for (u32 id = 1; id < count; id++) {
		ipi(id, 0x41);
		wait(&got[0x42], id); /* one at a time: pending ones merge */
	}
	show("answers", got[0x42]);
	ipi(0, 0xc0043);	/* all but self */
	wait(&got[0x43], count - 1);
	show("broadcast", got[0x43]);
	ipi(0, 0x40044);	/* self */
	wait(&got[0x44], 1);
	show("self", got[0x44]);
	return count;
}
