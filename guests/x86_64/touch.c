/*
 * touch: read or write pages of a range in a pattern, epoch by epoch.
 *
 * In epoch e = 0 .. epochs - 1 vCPU v of n takes every index i of its pattern
 * with i % n == v, touches one word of that page, and rings the doorbell with e.
 * The pages of an epoch:
 *   pattern 0, sequential: start + i * stride, for all such pages in the range
 *   pattern 1, backwards:  the same, from the last one down
 *   pattern 2, random:     start + mix(mix(seed + e) + i) % pages, i < count
 *
 * After each epoch its number and the touches so far are in the vCPU's results.
 *
 * Ports out: doorbell after each epoch, exit with 0.
 */
#include "guest.h"

PARAM("gfn_start=1024;first gfn of the range");
PARAM("pages=1024 pages;size of the range");
PARAM("stride=1;take every n-th page (sequential, backwards)");
PARAM("pattern=0;0 sequential, 1 backwards, 2 random");
PARAM("write=0;0 read, 1 write");
PARAM("epochs=1;epochs; 0 runs for ever");
PARAM("seed=1;of the random pattern");
PARAM("count=64;touches an epoch (random)");

enum { START, PAGES, STRIDE, PATTERN, WRITE, EPOCHS, SEED, COUNT };
enum { SEQUENTIAL, BACKWARDS, RANDOM };

static void touch(u64 gfn, int write)
{
	volatile u64 *word = (volatile u64 *)(gfn * PAGE_BYTES);

	if (write)
		*word = gfn;
	else
		(void)*word;
}

u64 guest_main(u64 vcpu, struct params *params)
{
	const u64 *args = params->args;
	u64 stride = args[STRIDE] ? args[STRIDE] : 1, touches = 0;
	u64 n = args[PATTERN] == RANDOM ? args[COUNT] : (args[PAGES] + stride - 1) / stride;
	struct result *result = &params->results[vcpu];

	for (u64 epoch = 0; !args[EPOCHS] || epoch < args[EPOCHS]; epoch++) {
		u64 base = mix(args[SEED] + epoch);

		for (u64 i = vcpu; i < n; i += params->n_vcpus) {
			u64 step = args[PATTERN] == BACKWARDS ? n - 1 - i : i;
			u64 page = args[PATTERN] == RANDOM ? mix(base + i) % args[PAGES]
							   : step * stride;

			touch(args[START] + page, args[WRITE] != 0);
			touches++;
		}
		result->epoch = epoch;
		result->touches = touches;
		doorbell(epoch);
	}
	return 0;
}
