/*
 * Stress of the secondary MMU: harvests, faults, maps, unmaps, splits, collapses,
 * zaps and invalidations at once, for some seconds; then the books must balance.
 *
 *     mmu_stress FORMAT SECONDS [SEED]
 *
 * FORMAT: npt, ept, stage2, radix; -sw: accessed bits by the fault handler, -64k: larger
 * base pages, -fast: freed tables are not poisoned, so that walks look at each entry only
 * once. Built from the core's own sources with a sanitizer, without Python. Exits with 0 if nothing was wrong.
 *
 * Conservation: every accessed bit that came to be (born with its leaf, set by an
 * access, copied by a split) was cleared by exactly one harvest or clear_young,
 * dropped with its leaf, merged by a collapse, or is still there. A harvest that
 * clears all that it finds reports what it cleared, and nothing that another did.
 */
#include "mmu_internal.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "soft.h"

#define N_PAGES 8192u
#define N_SLOTS 2

static struct kh_mmu *mmu;
static bool stop;
static uint64_t harvested, lost, poisoned, bad_pointers, yields, harvests, misreported;
static uint64_t maps, unmaps, splits, collapses, zaps, invalidations;

static bool stopped(void)
{
	return __atomic_load_n(&stop, __ATOMIC_RELAXED);
}

static uint64_t draw(uint64_t *state, uint64_t n)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15ull;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	return ((z ^ (z >> 27)) >> 8) % n;
}

static void pause_for(uint64_t us)
{
	struct timespec t = { .tv_nsec = (long)us * 1000 };

	nanosleep(&t, NULL);
}

/* Whether a harvest without a mask reported more than it cleared itself. */
static bool reports_too_much(const struct kh_walk_stats *stats, const uint64_t *young,
			     const uint64_t *coarse)
{
	uint64_t single = 0;

	for (unsigned int i = 0; i < N_PAGES / 64 + 1; i++)
		single += (uint64_t)__builtin_popcountll(young[i] & ~coarse[i]);
	return stats->young != stats->cleared || single > stats->cleared;
}

static void *harvester(void *argument)
{
	uint64_t random = (uint64_t)(uintptr_t)argument;
	uint64_t mask[N_PAGES / 64 + 1], young[N_PAGES / 64 + 1], coarse[N_PAGES / 64 + 1];

	while (!stopped()) {
		struct kh_walk_stats stats = { 0 };
		struct kh_segment segment = { .gfn_start = draw(&random, N_PAGES) };
		bool masked = !draw(&random, 4);

		segment.n_pages = 1 + draw(&random, N_PAGES - segment.gfn_start);
		for (unsigned int i = 0; i < N_PAGES / 64 + 1; i++)
			mask[i] = draw(&random, UINT64_MAX);
		memset(young, 0, sizeof(young));
		memset(coarse, 0, sizeof(coarse));
		kh_mmu_harvest(mmu, &segment, 1, KH_HARVEST_CLEAR, masked ? mask : NULL, young,
			       coarse, &stats);
		if (!masked && reports_too_much(&stats, young, coarse))
			kh_count(&misreported, 1);
		kh_count(&harvested, stats.cleared);
		kh_count(&lost, stats.lost);
		kh_count(&poisoned, stats.poisoned);
		kh_count(&bad_pointers, stats.bad_pointers);
		kh_count(&yields, stats.yields);
		kh_count(&harvests, 1);
		if (!draw(&random, 8)) {
			uint64_t gfn = draw(&random, N_PAGES);

			kh_mmu_clear_young(mmu, 0, gfn, gfn + 1);
			kh_mmu_clear_flush_young(mmu, 0, gfn, gfn + 1);
			kh_mmu_test_young(mmu, 0, 0, N_PAGES);
			memset(young, 0, sizeof(young));
			kh_mmu_harvest(mmu, &segment, 1, KH_HARVEST_CLEAR | KH_HARVEST_DIRTY, NULL,
				       young, coarse, &stats);
		}
	}
	return NULL;
}

static void *mapper(void *argument)
{
	uint64_t random = (uint64_t)(uintptr_t)argument;

	while (!stopped()) {
		struct kh_map map = { .flags = (uint32_t)draw(&random, 8) };
		uint64_t pages, per_page = 1ull << (mmu->fmt.page_shift - 12);

		map.level = draw(&random, 4) ? 1 : 2;
		pages = kh_level_pages(&mmu->fmt, map.level);
		map.gfn = draw(&random, N_PAGES / pages) * pages;
		map.pfn = map.gfn * per_page;
		if (!kh_mmu_map(mmu, &map))
			kh_count(&maps, 1);
		pause_for(20);
	}
	return NULL;
}

static void *unmapper(void *argument)
{
	uint64_t random = (uint64_t)(uintptr_t)argument;

	while (!stopped()) {
		uint64_t start = draw(&random, N_PAGES);
		uint64_t n = draw(&random, 4) ? 64 : 2048;
		uint64_t end = start + n < N_PAGES ? start + n : N_PAGES;
		struct kh_segment range = { .gfn_start = start, .n_pages = end - start };

		switch (draw(&random, 4)) {
		case 0:
			kh_mmu_invalidate_start(mmu, &range, 1);
			pause_for(50);
			kh_mmu_invalidate_end(mmu, &range, 1);
			kh_count(&invalidations, 1);
			break;
		case 1:
			kh_mmu_write_protect(mmu, 0, start, end);
			break;
		default:
			kh_mmu_unmap(mmu, 0, start, end, draw(&random, 2) ? KH_DEFER_FLUSH : 0);
			kh_mmu_flush_remote_cond(mmu, 0);
			kh_count(&unmaps, 1);
		}
		pause_for(100);
	}
	return NULL;
}

/* A whole table's leaves, so that there is something to collapse. */
static void fill_table(uint64_t gfn, uint64_t pages)
{
	uint64_t per_page = 1ull << (mmu->fmt.page_shift - 12);

	for (uint64_t i = 0; i < pages; i++) {
		struct kh_map map = {
			.gfn = gfn + i,
			.pfn = (gfn + i) * per_page,
			.level = 1,
			.flags = KH_LEAF_WRITE | (i % 3 ? KH_LEAF_YOUNG : 0),
		};

		kh_mmu_map(mmu, &map);
	}
}

static void *splitter(void *argument)
{
	uint64_t random = (uint64_t)(uintptr_t)argument;
	uint64_t pages = kh_level_pages(&mmu->fmt, 2);

	while (!stopped()) {
		uint64_t gfn = draw(&random, N_PAGES / pages) * pages;

		if (kh_mmu_split(mmu, 0, gfn, gfn + 1) > 0)
			kh_count(&splits, 1);
		if (draw(&random, 2))
			fill_table(gfn, pages);
		if (!kh_mmu_collapse(mmu, 0, gfn, 2))
			kh_count(&collapses, 1);
		pause_for(50);
	}
	return NULL;
}

static void *zapper(void *argument)
{
	uint64_t random = (uint64_t)(uintptr_t)argument;

	while (!stopped()) {
		pause_for(2000 + draw(&random, 8000));
		if (draw(&random, 2)) {
			kh_mmu_zap_all(mmu);
		} else {
			kh_mmu_invalidate_roots(mmu);
			pause_for(500);
			kh_mmu_zap_invalidated_roots(mmu);
		}
		kh_count(&zaps, 1);
	}
	return NULL;
}

static int configure(const char *name, struct kh_mmu_config *config)
{
	memset(config, 0, sizeof(*config));
	config->flags = strstr(name, "-fast") ? 0 : KH_MMU_POISON;
	if (!strncmp(name, "npt", 3))
		config->format = KH_FMT_NPT;
	else if (!strcmp(name, "ept"))
		config->format = KH_FMT_EPT;
	else if (!strncmp(name, "stage2", 6))
		config->format = KH_FMT_STAGE2;
	else if (!strncmp(name, "radix", 5))
		config->format = KH_FMT_RADIX;
	else
		return -EINVAL;
	if (strstr(name, "-sw"))
		config->flags |= KH_MMU_SW_ACCESS;
	if (strstr(name, "-64k"))
		config->page_shift = 16;
	return 0;
}

static int add_slots(void)
{
	struct kh_slot slots[N_SLOTS];

	for (uint32_t i = 0; i < N_SLOTS; i++) {
		uint64_t first = i * (N_PAGES / N_SLOTS);

		slots[i] = (struct kh_slot){
			.gfn_start = first,
			.n_pages = N_PAGES / N_SLOTS,
			.pfn_start = first << (mmu->fmt.page_shift - 12),
			.max_level = i ? 2 : 1,
		};
	}
	return kh_mmu_set_slots(mmu, slots, N_SLOTS);
}

static uint64_t still_young(void)
{
	uint64_t young[N_PAGES / 64] = { 0 }, coarse[N_PAGES / 64] = { 0 };
	struct kh_segment all = { .n_pages = N_PAGES };
	struct kh_walk_stats stats = { 0 };

	kh_mmu_harvest(mmu, &all, 1, 0, NULL, young, coarse, &stats);
	return stats.young;
}

static int balance(const char *name)
{
	struct kh_mmu_stats s;
	uint64_t in, out, left;
	bool ok;

	kh_mmu_zap_invalidated_roots(mmu);
	kh_mmu_synchronize(mmu);
	left = still_young();
	kh_mmu_get_stats(mmu, &s);
	in = s.born_young + s.set_young + s.copied_young;
	out = harvested + s.cleared_young + s.dropped_young + s.merged_young + left;
	printf("%s: born %llu set %llu copied %llu | harvested %llu cleared %llu dropped %llu "
	       "merged %llu left %llu\n",
	       name, (unsigned long long)s.born_young, (unsigned long long)s.set_young,
	       (unsigned long long)s.copied_young, (unsigned long long)harvested,
	       (unsigned long long)s.cleared_young, (unsigned long long)s.dropped_young,
	       (unsigned long long)s.merged_young, (unsigned long long)left);
	printf("  harvests %llu maps %llu unmaps %llu splits %llu collapses %llu zaps %llu "
	       "invalidations %llu lost %llu yields %llu faults %llu retries %llu freed %llu\n",
	       (unsigned long long)harvests, (unsigned long long)maps, (unsigned long long)unmaps,
	       (unsigned long long)splits, (unsigned long long)collapses,
	       (unsigned long long)zaps, (unsigned long long)invalidations,
	       (unsigned long long)lost, (unsigned long long)yields,
	       (unsigned long long)s.faults, (unsigned long long)s.fault_retries,
	       (unsigned long long)s.freed);
	ok = in == out && !poisoned && !bad_pointers && !misreported && s.retired == 0 && harvested && collapses &&
	     splits && zaps && s.freed;
	if (!ok)
		printf("  FAILED: in %llu out %llu poisoned %llu bad pointers %llu retired %llu "
		       "misreported %llu\n",
		       (unsigned long long)in, (unsigned long long)out,
		       (unsigned long long)poisoned, (unsigned long long)bad_pointers,
		       (unsigned long long)s.retired, (unsigned long long)misreported);
	kh_mmu_release(mmu);
	kh_mmu_synchronize(mmu);
	kh_mmu_get_stats(mmu, &s);
	if (s.table_bytes || s.roots) {
		printf("  FAILED: %llu bytes of tables and %llu roots after release\n",
		       (unsigned long long)s.table_bytes, (unsigned long long)s.roots);
		ok = false;
	}
	return ok ? 0 : 1;
}

int main(int argc, char **argv)
{
	void *(*const work[])(void *) = { harvester, harvester, mapper, unmapper, splitter, zapper };
	struct kh_soft_config trace = {
		.n_vcpus = 6,
		.n_threads = 3,
		.trace = KH_TRACE_RANDOM,
		.n_pages = N_PAGES,
		.write_permille = 300,
		.tlb_sets = 16,
		.tlb_ways = 4,
		.huge_sets = 4,
		.huge_ways = 2,
	};
	pthread_t threads[sizeof(work) / sizeof(*work)];
	struct kh_soft_result results[6];
	struct kh_mmu_config config;
	struct kh_soft *soft;
	uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 0) : 1;
	int result;

	if (argc < 3 || configure(argv[1], &config) < 0)
		return 2;
	if (kh_mmu_open(&mmu, &config) < 0 || add_slots() < 0)
		return 2;
	trace.seed = seed;
	if (kh_soft_start(&soft, mmu, &trace) < 0)
		return 2;
	for (unsigned int i = 0; i < sizeof(work) / sizeof(*work); i++)
		if (pthread_create(&threads[i], NULL, work[i], (void *)(uintptr_t)(seed * 100 + i)))
			return 2;
	pause_for(0);
	for (uint64_t ms = strtoull(argv[2], NULL, 0) * 1000; ms; ms -= 10)
		pause_for(10000);
	__atomic_store_n(&stop, true, __ATOMIC_RELAXED);
	kh_soft_stop(soft);
	for (unsigned int i = 0; i < sizeof(work) / sizeof(*work); i++)
		pthread_join(threads[i], NULL);
	kh_soft_finish(soft, results);
	result = balance(argv[1]);
	kh_mmu_close(mmu);
	return result;
}
