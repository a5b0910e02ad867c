/*
 * stress: write all of a large range in phases, in step with the host.
 *
 * vCPU v of n has the v-th of n equal parts of [start, start + bytes). It takes one word
 * a page: stores the page's address, except where a value is named. Each phase ends
 * with the doorbell; the host releases all vCPUs when the last one has rung.
 *
 *   doorbell 0  run1: stores
 *   doorbell 1  run2: stores again
 *   doorbell 2  ro: loads, then passes of stores until the host has set ro_done
 *   doorbell 3  one pass of stores of MARKER
 *   doorbell 4  rw: stores
 *   doorbell 5  slots: passes of stores until slots_done, in every other memslot
 *   doorbell 6  unmap: the same until unmap_done, every stride-th page
 *   doorbell 7  one pass of the same
 *   doorbell 8  one pass of all pages in those memslots
 *
 * With stop=1 doorbells 2 and 3 and the pass before doorbell 3 are left out: the host
 * holds each vCPU at its first fault. Before doorbell 5 the vCPU reads the word
 * at probe, unless that is 0, and leaves it in its result.
 *
 * At the start the address of the store, which the host may skip, is in "word" of the
 * results; its length is STORE_BYTES. "touches" counts stores.
 *
 * Ports out: doorbell, exit with 0.
 */
#include "guest.h"

PARAM("start=4294967296;gpa of the range");
PARAM("bytes=67108864;bytes of the range, whole pages for each vCPU");
PARAM("slot_bytes=67108864;bytes of a memslot");
PARAM("stop=0;1: the host holds vCPUs at their first fault");
PARAM("ro_done=0;set by the host: the range is read-only");
PARAM("slots_done=0;set by the host: every other memslot is deleted");
PARAM("unmap_done=0;set by the host: memory is unmapped");
PARAM("probe=0;gpa of a word that is read before doorbell 5, 0 for none");
PARAM("stride=1;in the phase unmap, take every n-th page");

enum { START, BYTES, SLOT_BYTES, STOP, RO_DONE, SLOTS_DONE, UNMAP_DONE, PROBE, STRIDE };

#define MARKER 0x6b766d737472736bul

/* The only store to the range: movq %rsi, (%rdi), STORE_BYTES 3. */
__asm__(".pushsection .text\n"
	".globl stress_store\n"
	".type stress_store, @function\n"
	"stress_store:\n"
	"	.byte 0x48, 0x89, 0x37\n"
	"	ret\n"
	".popsection\n");
void stress_store(u64 gpa, u64 value);

struct part {
	u64 start, end, origin, slot_bytes;
	struct result *result;
};

/* One pass over the part; every_other: leave out memslots with odd numbers. */
static void pass_by(const struct part *part, int every_other, u64 value, u64 step)
{
	for (u64 gpa = part->start; gpa < part->end; gpa += step) {
		if (every_other && ((gpa - part->origin) / part->slot_bytes & 1))
			continue;
		stress_store(gpa, value ? value : gpa);
		part->result->touches++;
	}
}

static void pass(const struct part *part, int every_other, u64 value)
{
	pass_by(part, every_other, value, PAGE_BYTES);
}

static void passes_until(const struct part *part, int every_other, volatile const u64 *done,
			 u64 step)
{
	do
		pass_by(part, every_other, 0, step);
	while (!*done);
}

u64 guest_main(u64 vcpu, struct params *params)
{
	volatile const u64 *args = params->args;
	u64 n_bytes = args[BYTES] / params->n_vcpus / PAGE_BYTES * PAGE_BYTES;
	u64 start = args[START] + vcpu * n_bytes, step = args[STRIDE] * PAGE_BYTES;
	struct result *result = &params->results[vcpu];
	struct part part = { start, start + n_bytes, args[START], args[SLOT_BYTES], result };

	result->word = (u64)stress_store;
	pass(&part, 0, 0);
	doorbell(0);
	pass(&part, 0, 0);
	doorbell(1);
	for (u64 gpa = part.start; gpa < part.end; gpa += PAGE_BYTES)
		(void)*(volatile u64 *)gpa;
	passes_until(&part, 0, &args[RO_DONE], PAGE_BYTES);
	if (!args[STOP]) {
		doorbell(2);
		pass(&part, 0, MARKER);
		doorbell(3);
	}
	pass(&part, 0, 0);
	doorbell(4);
	passes_until(&part, 1, &args[SLOTS_DONE], PAGE_BYTES);
	if (args[PROBE])
		result->found = *(volatile u64 *)args[PROBE];
	doorbell(5);
	passes_until(&part, 1, &args[UNMAP_DONE], step);
	doorbell(6);
	pass_by(&part, 1, 0, step);
	doorbell(7);
	pass(&part, 1, 0);
	doorbell(8);
	return 0;
}
