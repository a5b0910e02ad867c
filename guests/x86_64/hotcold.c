/*
 * hotcold: a seeded workload that verifies the contents of all its pages.
 *
 * Every page holds words derived from its gfn and the epoch of its last write. Each
 * touch first checks the page's first `words` words (all 4096 bytes by default)
 * against the epoch that this guest remembers, then (on a write) fills them again.
 * One lost or stale byte ends the run: status 1, and gfn, epoch and words in the
 * results. Parameters that do not fit into memory: status 2.
 *
 * The range of `pages` pages from gfn_start on is divided among the vCPUs in equal
 * runs (a remainder stays untouched). The bookkeeping of the guest follows the
 * range: four bytes per page, and eight more with zipf. For a vCPU's run of m pages,
 * from page b on, with the random numbers x(i) = mix(mix(seed + e) + b + i):
 *   epoch 0 writes every page of the run;
 *   epoch e > 0 touches, in this order
 *     hot:  `passes` times h = hot * m / pages pages from page m / 4 + d of the run;
 *     cold: random pages b + x(i) % m, i < cold;
 *     zipf: pages b + (k * 2654435761 + d) % m, k = the zipf-distributed rank
 *           (zipf.h) of x(cold + i), i < zipf;
 *     scan: if scan_every, and s = e % scan_every < scan_epochs: slice s of the
 *           run, pages [m * s / scan_epochs, m * (s + 1) / scan_epochs).
 *   The phase moves hot pages and popular ones by d = p * (phase_step * m / pages),
 *   p = e / phase_every (0 without); the hot set wraps at the end of the run.
 *   A touch in epoch e writes if mix(gfn ^ e << 32) % 1000 < write_permille,
 *   and reads otherwise. After it the vCPU makes `think` empty loop turns.
 * guests/workloads.py computes the same sets on the host. The results count the
 * touches while the guest runs.
 *
 * Ports out: doorbell after each epoch, serial on failure and every `say_every`
 * epochs, exit.
 */
#include "guest.h"
#include "zipf.h"

PARAM("gfn_start=1024;first gfn of the range");
PARAM("pages=4096 pages;size of the range");
PARAM("hot=768 pages;size of the hot set, over all vCPUs");
PARAM("cold=16;random pages an epoch and vCPU");
PARAM("scan_every=64;a scan starts every so many epochs; 0: never");
PARAM("scan_epochs=16;epochs that a scan takes");
PARAM("write_permille=500 permille;share of touches that write");
PARAM("same_filled_permille=250 permille;share of pages filled with one word");
PARAM("epochs=100;epochs; 0 runs for ever");
PARAM("seed=1;of the workload");
PARAM("passes=1;times that an epoch touches the hot set");
PARAM("zipf=0;zipf-distributed touches an epoch and vCPU");
PARAM("zipf_permille=900 permille;exponent of the zipf distribution");
PARAM("phase_every=0;the hot set moves every so many epochs; 0: never");
PARAM("phase_step=768 pages;distance that it moves by, over all vCPUs");
PARAM("think=0;empty loop turns after each touch");
PARAM("words=512;words of a page that a touch checks or writes");
PARAM("say_every=0;a line on the serial port every so many epochs; 0: never");

enum {
	START, PAGES, HOT, COLD, SCAN_EVERY, SCAN_EPOCHS, WRITE, SAME_FILLED, EPOCHS, SEED,
	PASSES, ZIPF, ZIPF_PERMILLE, PHASE_EVERY, PHASE_STEP, THINK, WORDS, SAY_EVERY
};

struct state {
	const u64 *args;
	u64 epoch, touches;
	u32 *written;		/* epoch of the last write + 1, by page of the range */
	u64 *zipf_sums;		/* of this vCPU */
	struct result *result;
};

/* Fifteen words in sixteen are the value of the page, so that a page compresses. */
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

	for (u64 i = 0; i < state->args[WORDS]; i++) {
		u64 expected = value ? word_at(value, i, same_filled) : 0, found = words[i];

		if (found != expected) {
			struct line line = { 0 };

			*state->result = (struct result){ 1, gfn, state->epoch, expected, found, i,
							  state->result->touches, 0 };
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

static void fill(u64 gfn, u64 value, int same_filled, u64 n_words)
{
	volatile u64 *words = (volatile u64 *)(gfn * PAGE_BYTES);

	for (u64 i = 0; i < n_words; i++)
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
		fill(gfn, value_of(gfn, state->written[page]), same_filled, state->args[WORDS]);
	}
	for (u64 i = 0; i < state->args[THINK]; i++)
		__asm__ volatile("");
	__atomic_store_n(&state->result->touches, ++state->touches, __ATOMIC_RELAXED);
	return 1;
}

static int touch_range(struct state *state, u64 start, u64 end)
{
	for (u64 page = start; page < end; page++)
		if (!touch(state, page))
			return 0;
	return 1;
}

/* The hot set: n pages of the run from page `first` on, which may wrap at its end. */
static int touch_hot(struct state *state, u64 base, u64 n_pages, u64 first, u64 n)
{
	u64 before_end = n_pages - first < n ? n_pages - first : n;

	return touch_range(state, base + first, base + first + before_end) &&
	       touch_range(state, base, base + n - before_end);
}

static int run_epoch(struct state *state, u64 base, u64 n_pages)
{
	const u64 *args = state->args;
	u64 random = mix(args[SEED] + state->epoch) + base;
	u64 step = args[SCAN_EVERY] ? state->epoch % args[SCAN_EVERY] : args[SCAN_EPOCHS];
	u64 phase = args[PHASE_EVERY] ? state->epoch / args[PHASE_EVERY] : 0;
	u64 moved = phase * (args[PHASE_STEP] * n_pages / args[PAGES]);
	u64 hot = args[HOT] * n_pages / args[PAGES], hot_start = (n_pages / 4 + moved) % n_pages;

	for (u64 i = 0; i < args[PASSES]; i++)
		if (!touch_hot(state, base, n_pages, hot_start, hot))
			return 0;
	for (u64 i = 0; i < args[COLD]; i++)
		if (!touch(state, base + mix(random + i) % n_pages))
			return 0;
	for (u64 i = 0; i < args[ZIPF]; i++) {
		u64 rank = zipf_rank(state->zipf_sums, n_pages, mix(random + args[COLD] + i));

		if (!touch(state, base + (rank * 2654435761ul + moved) % n_pages))
			return 0;
	}
	if (step >= args[SCAN_EPOCHS])
		return 1;
	return touch_range(state, base + n_pages * step / args[SCAN_EPOCHS],
			   base + n_pages * (step + 1) / args[SCAN_EPOCHS]);
}

static void say_epoch(u64 vcpu, u64 epoch)
{
	struct line line = { 0 };

	put_text(&line, "hotcold: vCPU ");
	put_hex(&line, vcpu);
	put_text(&line, " ends epoch ");
	put_hex(&line, epoch);
	send(&line);
}

/* Memory that a guest of these parameters needs: up to this address. */
static u64 needed_end(const u64 *args)
{
	u64 end = (args[START] + args[PAGES]) * PAGE_BYTES + args[PAGES] * sizeof(u32) + 8;

	return args[ZIPF] ? end + args[PAGES] * sizeof(u64) : end;
}

static int fits(const struct params *params)
{
	const u64 *args = params->args;

	return args[PAGES] >= params->n_vcpus && args[HOT] <= args[PAGES] * 3 / 4 &&
	       args[WORDS] >= 1 && args[WORDS] <= PAGE_WORDS &&
	       args[START] * PAGE_BYTES >= params->free_start &&
	       needed_end(args) <= params->free_end;
}

u64 guest_main(u64 vcpu, struct params *params)
{
	const u64 *args = params->args;
	u64 n_pages = args[PAGES] / params->n_vcpus, base = n_pages * vcpu;
	u64 notes = (args[START] + args[PAGES]) * PAGE_BYTES;
	struct state state = {
		.args = args,
		.written = (u32 *)notes,
		.zipf_sums = (u64 *)(notes + (args[PAGES] + 1) / 2 * 8) + base,
		.result = &params->results[vcpu],
	};

	if (!fits(params)) {
		struct line line = { 0 };

		put_text(&line, "hotcold: parameters do not fit into memory, or each other");
		send(&line);
		return 2;
	}
	if (args[ZIPF])
		zipf_sums(state.zipf_sums, n_pages, args[ZIPF_PERMILLE]);
	if (!touch_range(&state, base, base + n_pages))
		return 1;
	doorbell(0);
	for (state.epoch = 1; !args[EPOCHS] || state.epoch < args[EPOCHS]; state.epoch++) {
		state.result->epoch = state.epoch;
		if (!run_epoch(&state, base, n_pages))
			return 1;
		if (args[SAY_EVERY] && state.epoch % args[SAY_EVERY] == 0)
			say_epoch(vcpu, state.epoch);
		doorbell(state.epoch);
	}
	return 0;
}
