/*
 * The local APICs in x2APIC mode: every processor switches, reads its id by MSR,
 * and answers an interrupt sent to a 32-bit id. The exit value is the number of
 * answers.
 */
#define OWN_HANDLER
#define OWN_AP
#include "main.h"

#define X2APIC_ID 0x802
#define X2APIC_EOI 0x80b
#define X2APIC_SVR 0x80f
#define X2APIC_ICR 0x830

static struct gate idt[256];
static volatile u32 ready, answers, ids[16];

static void enable_x2apic(void)
{
	wrmsr(0x1b, rdmsr(0x1b) | 0xc00);
	wrmsr(X2APIC_SVR, 0x1ff);
}

void handle(u32 vector)
{
	if (vector == 0x45)
		__sync_fetch_and_add(&answers, 1);
	wrmsr(X2APIC_EOI, 0);
}

void ap_main(u32 index)
{
	enable_x2apic();
	lidt(idt);
	ids[index] = (u32)rdmsr(X2APIC_ID);
	__sync_fetch_and_add(&ready, 1);
	for (;;)
		sti_hlt();
}

u32 main(u32 magic, struct mb_info *info)
{
	u32 count = cpu_count(), leaf[4];

	(void)magic;
	(void)info;
	cpuid(1, 0, leaf);
	show("x2apic", leaf[2] >> 21 & 1);
	load_idt(idt);
	start_processors(count);
	while (ready < count - 1)
		pause();
	enable_x2apic();
	show("mode", rdmsr(0x1b) & 0xc00);
	show("id", rdmsr(X2APIC_ID));
	sti();
	for (u32 id = 0; id < count; id++) {
		u32 before = answers;

		wrmsr(X2APIC_ICR, (u64)id << 32 | 0x45);
		while (answers == before)
			pause();
		show("answered", id);
	}
	return answers;
}
