/*
 * freepages: fill pages, declare some free, and check that those read as zeros
 * and all others still hold what they held.
 *
 * In epoch e = 0 .. epochs - 1 vCPU v of n owns the pages start + i, i < pages,
 * i % n == v. It fills its pages with words derived from gfn and e and rings the
 * doorbell with 3 * e. Then it declares those with mix(seed + e + i) % 100 < percent
 * free, by lists of up to 254 ranges, and rings with 3 * e + 1. Then it checks every
 * word of all its pages and rings with 3 * e + 2.
 *
 * Ports out: free; doorbell three times an epoch; exit with 0, with 1 if a word is
 * not what it should be (then the result has gfn, epoch, expected and found), or
 * with 2 if the host kept pages that were declared free.
 */
#include "guest.h"

PARAM("gfn_start=1024;first gfn of the range");
PARAM("pages=1024 pages;size of the range");
PARAM("epochs=3;epochs; 0 runs for ever");
PARAM("percent=50 percent;of its pages that each epoch declares free");
PARAM("seed=1;of the choice");

enum { START, PAGES, EPOCHS, PERCENT, SEED };

static struct free_list lists[32];

static u64 is_free(const u64 *args, u64 epoch, u64 i)
{
	return mix(args[SEED] + epoch + i) % 100 < args[PERCENT];
}

static u64 word_of(u64 gfn, u64 epoch, u64 word)
{
	return mix(mix(gfn + (epoch << 40)) + word);
}

static void fill(u64 gfn, u64 epoch)
{
	volatile u64 *words = (volatile u64 *)(gfn * PAGE_BYTES);

	for (u64 i = 0; i < PAGE_WORDS; i++)
		words[i] = word_of(gfn, epoch, i);
}

static u64 is_right(u64 gfn, u64 epoch, u64 freed, struct result *result)
{
	volatile u64 *words = (volatile u64 *)(gfn * PAGE_BYTES);

	for (u64 i = 0; i < PAGE_WORDS; i++) {
		u64 expected = freed ? 0 : word_of(gfn, epoch, i), found = words[i];

		if (found == expected)
			continue;
		result->status = 1;
		result->gfn = gfn;
		result->epoch = epoch;
		result->expected = expected;
		result->found = found;
		return 0;
	}
	return 1;
}

/* 0, or 2 if a page was kept. */
static u64 send_list(struct free_list *list, u64 pages)
{
	declare_free(list);
	list->n_ranges = 0;
	return list->dropped_pages == pages && !list->kept_pages ? 0 : 2;
}

static u64 declare(u64 vcpu, u64 n_vcpus, const u64 *args, u64 epoch)
{
	struct free_list *list = &lists[vcpu];
	u64 pages = 0, status = 0;

	for (u64 i = vcpu; i < args[PAGES] && !status; i += n_vcpus) {
		u64 gfn = args[START] + i, last = list->n_ranges - 1;

		if (!is_free(args, epoch, i))
			continue;
		if (n_vcpus == 1 && list->n_ranges &&
		    list->ranges[last].gfn + list->ranges[last].n_pages == gfn) {
			list->ranges[last].n_pages++;
		} else {
			list->ranges[list->n_ranges].gfn = gfn;
			list->ranges[list->n_ranges++].n_pages = 1;
		}
		pages++;
		if (list->n_ranges == FREE_RANGES) {
			status = send_list(list, pages);
			pages = 0;
		}
	}
	return status ? status : send_list(list, pages);
}

u64 guest_main(u64 vcpu, struct params *params)
{
	const u64 *args = params->args;

	for (u64 epoch = 0; !args[EPOCHS] || epoch < args[EPOCHS]; epoch++) {
		u64 status;

		for (u64 i = vcpu; i < args[PAGES]; i += params->n_vcpus)
			fill(args[START] + i, epoch);
		doorbell(3 * epoch);
		status = declare(vcpu, params->n_vcpus, args, epoch);
		if (status)
			return status;
		doorbell(3 * epoch + 1);
		for (u64 i = vcpu; i < args[PAGES]; i += params->n_vcpus)
			if (!is_right(args[START] + i, epoch, is_free(args, epoch, i),
				      &params->results[vcpu]))
				return 1;
		doorbell(3 * epoch + 2);
	}
	return 0;
}
