/*
 * hotcold: a seeded workload that owns its pages and trusts none of them.
 *
 * Every page holds words derived from its gfn and the epoch of its last write.
 * Each touch first checks all 4096 bytes against the epoch that this guest
 * remembers, then (on a write) fills the page anew. One lost or stale byte ends
 * the run: status 1, and gfn, epoch and words in the results.
 *
 * The range of `pages` pages from start_gfn on is dealt out to the vCPUs in
 * equal runs (a remainder stays untouched). The last-write epochs follow the
 * range, four bytes a page. For a vCPU's run of m pages, from page b on:
 *   epoch 0 writes every page of the run;
 *   epoch e > 0 touches
 *     hot:  h = hot * m / pages pages, m / 4 pages into the run;
 *     cold: `cold` random pages, b + mix(mix(seed + e) + b + i) % m;
 *     scan: if scan_every, and s = e % scan_every < scan_epochs: slice s of the
 *           run, pages [m * s / scan_epochs, m * (s + 1) / scan_epochs).
 *   A touch in epoch e writes if mix(gfn ^ e << 32) % 1000 < write_permille,
 *   and reads otherwise.
 * guests/workloads.py computes the same sets on the host.
 *
 * Ports out: doorbell after each epoch, serial on failure, exit.
 */
#include "guest.h"

PARAM("start_gfn=1024;first gfn of the range");
PARAM("pages=4096;pages in the range");
PARAM("hot=768;pages of the hot set, over all vCPUs");
PARAM("cold=16;random pages an epoch and vCPU");
PARAM("scan_every=64;a scan starts every so many epochs; 0: never");
PARAM("scan_epochs=16;epochs that a scan takes");
PARAM("write_permille=500;share of touches that write");
PARAM("same_filled_permille=250;share of pages filled with one word");
PARAM("epochs=100;epochs; 0 runs for ever");
PARAM("seed=1;of the workload");

enum { START, PAGES, HOT, COLD, SCAN_EVERY, SCAN_EPOCHS, WRITE, SAME_FILLED, EPOCHS, SEED };

struct state {
	const u64 *args;
	u64 epoch;
	u32 *written;		/* epoch of the last write + 1, by page of the range */
	struct result *result;
};

/* Fifteen words in sixteen carry the page's own value, so that a page compresses. */
static inline u64 word_at(u64 value, u64 i, int same_filled)
{
	return same_filled || (i & 15) ? value : value + (i + 1) * 0x9e3779b97f4a7c15ul;
}

static u64 value_of(u64 gfn, u64 written)
{
	return written ? mix(gfn << 24 ^ written) | 1 : 0;
}

static int check(struct state *state, u64 gfn, u64 value, int same_filled)
{
	const volatile u64 *words = (const volatile u64 *)(gfn * PAGE_BYTES);

	for (u64 i = 0; i < PAGE_WORDS; i++) {
		u64 expected = value ? word_at(value, i, same_filled) : 0, found = words[i];

		if (found != expected) {
			struct line line = { 0 };

			*state->result = (struct result){ 1, gfn, state->epoch, expected, found,
							  { i, 0, 0 } };
			put_text(&line, "hotcold: gfn ");
			put_hex(&line, gfn);
			put_text(&line, " word ");
			put_hex(&line, i);
			put_text(&line, " in epoch ");
			put_hex(&line, state->epoch);
			put_text(&line, ": expected ");
			put_hex(&line, expected);
			put_text(&line, ", found ");
			put_hex(&line, found);
			send(&line);
			return 0;
		}
	}
	return 1;
}

static void fill(u64 gfn, u64 value, int same_filled)
{
	volatile u64 *words = (volatile u64 *)(gfn * PAGE_BYTES);

	for (u64 i = 0; i < PAGE_WORDS; i++)
		words[i] = word_at(value, i, same_filled);
}

static int touch(struct state *state, u64 page)
{
	u64 gfn = state->args[START] + page;
	int same_filled = mix(gfn ^ state->args[SEED]) % 1000 < state->args[SAME_FILLED];
	int write = !state->epoch ||
		    mix(gfn ^ state->epoch << 32) % 1000 < state->args[WRITE];

	if (!check(state, gfn, value_of(gfn, state->written[page]), same_filled))
		return 0;
	if (write) {
		state->written[page] = (u32)state->epoch + 1;
		fill(gfn, value_of(gfn, state->written[page]), same_filled);
	}
	return 1;
}

static int touch_range(struct state *state, u64 start, u64 end)
{
	for (u64 page = start; page < end; page++)
		if (!touch(state, page))
			return 0;
	return 1;
}

static int run_epoch(struct state *state, u64 base, u64 n_pages)
{
	const u64 *args = state->args;
	u64 hot = args[HOT] * n_pages / args[PAGES], hot_start = base + n_pages / 4;
	u64 random = mix(args[SEED] + state->epoch) + base;
	u64 step = args[SCAN_EVERY] ? state->epoch % args[SCAN_EVERY] : args[SCAN_EPOCHS];

	if (!touch_range(state, hot_start, hot_start + hot))
		return 0;
	for (u64 i = 0; i < args[COLD]; i++)
		if (!touch(state, base + mix(random + i) % n_pages))
			return 0;
	if (step >= args[SCAN_EPOCHS])
		return 1;
	return touch_range(state, base + n_pages * step / args[SCAN_EPOCHS],
			   base + n_pages * (step + 1) / args[SCAN_EPOCHS]);
}

u64 guest_main(u64 vcpu, struct params *params)
{
	const u64 *args = params->args;
	u64 n_pages = args[PAGES] / params->n_vcpus, base = n_pages * vcpu;
	struct state state = {
		.args = args,
		.written = (u32 *)((args[START] + args[PAGES]) * PAGE_BYTES),
		.result = &params->results[vcpu],
	};

	if (!n_pages || args[HOT] > args[PAGES] * 3 / 4)
		return 2;
	if (!touch_range(&state, base, base + n_pages))
		return 1;
	doorbell(0);
	for (state.epoch = 1; !args[EPOCHS] || state.epoch < args[EPOCHS]; state.epoch++) {
		if (!run_epoch(&state, base, n_pages))
			return 1;
		doorbell(state.epoch);
	}
	return 0;
}
