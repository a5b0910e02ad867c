/*
 * Rounds of work that a snapshot must not disturb: timer interrupts, an interrupt
 * to each other processor and its answer, a pattern in memory, a monotonic clock.
 * Prints one line per round; 60 rounds, or as many as the last two digits of the
 * command line say. Exit value 0, or the number of the failed check.
 */
#define OWN_HANDLER
#define OWN_AP
#include "main.h"

#define WORDS 0x10000

static struct gate idt[256];
static volatile u32 ticks, answers;
static u32 pattern[WORDS];

void handle(u32 vector)
{
	if (vector == 0x60)
		ticks++;
	if (vector == 0x41)
		__sync_fetch_and_add(&answers, 1);
	eoi();
}

void ap_main(u32 index)
{
	(void)index;
	enable_apic();
	lidt(idt);
	__sync_fetch_and_add(&answers, 1);
	for (;;)
		sti_hlt();
}

static u32 word(u32 round, u32 i)
{
	return (round + 1) * 2654435761u ^ i * 40503u;
}

u32 main(u32 magic, struct mb_info *info)
{
	const char *at = (const char *)info->cmdline;
	u32 count = cpu_count(), rounds = 60;
	u64 last = rdtsc();

	(void)magic;
	while (*at)
		at++;
	if (at[-1] >= '0' && at[-1] <= '9' && at[-2] >= '0' && at[-2] <= '9')
		rounds = (u32)(at[-2] - '0') * 10 + (u32)(at[-1] - '0');
	load_idt(idt);
	start_processors(count);
	while (answers < count - 1)
		pause();
	out8(0x21, 0xff);
	write32(APIC + APIC_TIMER_DIVIDE, 0xb);
	write32(APIC + APIC_LVT_TIMER, 0x20060);
	write32(APIC + APIC_TIMER_INITIAL, 5000000);
	sti();
	for (u32 round = 0; round < rounds; round++) {
		u32 before = ticks, wanted = answers + count - 1;

		for (u32 i = round & 63; i < WORDS; i += 64)
			pattern[i] = word(round, i);
		if (count > 1)
			ipi(0, 0xc0041);
		while (ticks == before || answers != wanted)
			pause();
		for (u32 i = round & 63; i < WORDS; i += 64)
			if (pattern[i] != word(round, i))
				return 1;
		if (rdtsc() < last)
			return 2;
		last = rdtsc();
		show("round", round);
	}
	return 0;
}
