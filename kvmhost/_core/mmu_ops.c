/* Operations that change tables; mmu_ops.h documents the lock that each one takes. */
#include "mmu_internal.h"

#include <linux/membarrier.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

bool kh_range_ok(const struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end)
{
	return mmu->arena && as_id < mmu->n_as && start <= end && end <= kh_n_gfns(&mmu->fmt);
}

int kh_for_each_leaf(struct kh_mmu *mmu, struct kh_root *root, uint64_t start, uint64_t end,
		     kh_leaf_fn fn, void *arg)
{
	switch (mmu->fmt.id) {
	case KH_FMT_STAGE2:
		return kh_stage2_for_each_leaf(mmu, root, start, end, fn, arg);
	case KH_FMT_RADIX:
		return kh_radix_for_each_leaf(mmu, root, start, end, fn, arg);
	default:
		return kh_tdp_for_each_leaf(mmu, root, start, end, fn, arg);
	}
}

uint64_t *kh_entry_find(struct kh_mmu *mmu, struct kh_root *root, uint64_t gfn,
			unsigned int level)
{
	uint64_t *table = root->table;

	for (unsigned int at = mmu->fmt.n_levels; table; at--) {
		uint64_t *entry = table + kh_index(&mmu->fmt, gfn, at);
		uint64_t raw = kh_read_entry(entry);

		if (at == level)
			return entry;
		table = kh_table(&mmu->fmt, raw, at) ? kh_child(mmu, raw, at) : NULL;
	}
	return NULL;
}

/* Flushes. */

static void broadcast(void)
{
	static int ready;

	/*
	 * Interrupt every core that runs a thread of this process, to model the
	 * cost of a remote flush. Each vCPU checks tlb_seq before every access.
	 */
	if (!__atomic_load_n(&ready, __ATOMIC_ACQUIRE)) {
		syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0);
		__atomic_store_n(&ready, 1, __ATOMIC_RELEASE);
	}
	syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0);
}

void kh_mmu_flush_remote(struct kh_mmu *mmu)
{
	/* Lower the mark only by its value before the flush: a mark raised since then remains. */
	uint64_t dirty = __atomic_load_n(&mmu->tlbs_dirty, __ATOMIC_ACQUIRE);

	__atomic_fetch_add(&mmu->tlb_seq, 1, __ATOMIC_SEQ_CST);
	broadcast();
	kh_count(&mmu->counters.flushes, 1);
	__atomic_compare_exchange_n(&mmu->tlbs_dirty, &dirty, 0, false, __ATOMIC_ACQ_REL,
				    __ATOMIC_RELAXED);
}

int kh_mmu_flush_remote_cond(struct kh_mmu *mmu, int wanted)
{
	if (!wanted && !__atomic_load_n(&mmu->tlbs_dirty, __ATOMIC_ACQUIRE))
		return 0;
	kh_mmu_flush_remote(mmu);
	return 1;
}

/* Defer a flush: after the entry changed, and before the MMU lock is dropped. */
static void mark_tlbs_dirty(struct kh_mmu *mmu)
{
	__atomic_fetch_add(&mmu->tlbs_dirty, 1, __ATOMIC_SEQ_CST);
	kh_count(&mmu->counters.deferred, 1);
}

/* Map. */

static bool map_ok(const struct kh_mmu *mmu, const struct kh_map *map, uint64_t n)
{
	const struct kh_format *fmt = &mmu->fmt;
	uint64_t pages, frames;

	if (map->level < 1 || map->level > fmt->max_leaf_level)
		return false;
	pages = kh_level_pages(fmt, map->level);
	frames = pages << (fmt->page_shift - 12);
	return kh_range_ok(mmu, map->as_id, map->gfn, map->gfn) && n <= kh_n_gfns(fmt) / pages &&
	       map->gfn + n * pages <= kh_n_gfns(fmt) && map->gfn % pages == 0 &&
	       map->pfn % frames == 0 && map->pfn + n * frames - 1 <= fmt->addr_mask >> 12;
}

/* Takes the same lock as the format's faults. */
static int map_locked(struct kh_mmu *mmu, struct kh_root *root, const struct kh_map *map)
{
	int result;

	switch (mmu->fmt.id) {
	case KH_FMT_STAGE2:
		result = kh_stage2_map(mmu, root, map);
		break;
	case KH_FMT_RADIX:
		result = kh_radix_map(mmu, root, map);
		break;
	default:
		result = kh_tdp_map(mmu, root, map);
	}
	if (!result && map->flags & KH_LEAF_YOUNG)
		kh_count(&mmu->counters.born_young, 1);
	return result;
}

static void fault_lock(struct kh_mmu *mmu)
{
	if (mmu->fmt.id == KH_FMT_RADIX)
		kh_write_lock(&mmu->lock);
	else
		kh_read_lock(&mmu->lock);
}

/* Map a leaf, then its neighbours in the same table directly. Returns how many. */
static int64_t map_run(struct kh_mmu *mmu, struct kh_root *root, struct kh_map *map, uint64_t n)
{
	const struct kh_format *fmt = &mmu->fmt;
	uint64_t pages = kh_level_pages(fmt, map->level);
	uint64_t index = kh_index(fmt, map->gfn, map->level);
	uint64_t left = (1ull << fmt->bits[map->level]) - index;
	uint64_t *entry;
	uint64_t done = 1;
	int result = map_locked(mmu, root, map);

	if (result < 0)
		return result;
	entry = kh_entry_find(mmu, root, map->gfn, map->level);
	for (; entry && done < n && done < left; done++) {
		uint64_t pfn = map->pfn + done * (pages << (fmt->page_shift - 12));

		if (!kh_try_set(&entry[done], 0, kh_make_leaf(fmt, pfn, map->level, map->flags)))
			break;
	}
	if (map->flags & KH_LEAF_YOUNG)
		kh_count(&mmu->counters.born_young, done - 1);
	return (int64_t)done;
}

int kh_mmu_map_many(struct kh_mmu *mmu, const struct kh_map *map, uint64_t n)
{
	struct kh_map next = *map;
	uint64_t pages;

	if (!mmu->arena || !map_ok(mmu, map, n))
		return -EINVAL;
	pages = kh_level_pages(&mmu->fmt, map->level);
	while (n) {
		struct kh_root *root;
		int64_t done;

		fault_lock(mmu);
		root = kh_root_current(mmu, map->as_id);
		done = mmu->released || !root ? -ESHUTDOWN : map_run(mmu, root, &next, n);
		kh_unlock(&mmu->lock);
		if (done == -EAGAIN)
			continue;
		if (done < 0)
			return (int)done;
		n -= (uint64_t)done;
		next.gfn += (uint64_t)done * pages;
		next.pfn += (uint64_t)done * (pages << (mmu->fmt.page_shift - 12));
	}
	return 0;
}

int kh_mmu_map(struct kh_mmu *mmu, const struct kh_map *map)
{
	return kh_mmu_map_many(mmu, map, 1);
}

/* Unmap. */

static int unmap_leaf(const struct kh_leaf_ctx *ctx)
{
	kh_leaf_remove(ctx->mmu, ctx->entry, ctx->level, 0);
	*(bool *)ctx->arg = true;
	return 0;
}

/* With the lock held for write. Every root of the address space, invalid ones too. */
static bool unmap_locked(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end)
{
	unsigned int slot = kh_epoch_enter(&mmu->epoch);
	struct kh_root *root;
	bool any = false;

	kh_for_each_root_lockless(mmu, root, as_id) {
		if (mmu->fmt.id == KH_FMT_STAGE2)
			kh_stage2_unmap(mmu, root, start, end, &any);
		else
			kh_for_each_leaf(mmu, root, start, end, unmap_leaf, &any);
	}
	kh_epoch_exit(&mmu->epoch, slot);
	return any;
}

int kh_mmu_unmap(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end,
		 uint32_t flags)
{
	bool any;

	if (!kh_range_ok(mmu, as_id, start, end))
		return -EINVAL;
	kh_write_lock(&mmu->lock);
	any = unmap_locked(mmu, as_id, start, end);
	if (any && flags & KH_DEFER_FLUSH)
		mark_tlbs_dirty(mmu);
	kh_unlock(&mmu->lock);
	if (!(flags & KH_DEFER_FLUSH))
		kh_mmu_flush_remote_cond(mmu, any);
	return any;
}

/* Write-protect, split, collapse. */

static int protect_leaf(const struct kh_leaf_ctx *ctx)
{
	const struct kh_format *fmt = &ctx->mmu->fmt;
	uint64_t raw = ctx->old;

	while (kh_leaf(fmt, raw, ctx->level) && raw & fmt->raw_write_all) {
		if (__atomic_compare_exchange_n(ctx->entry, &raw, raw & ~fmt->raw_write_all, false,
						__ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE)) {
			*(bool *)ctx->arg = true;
			break;
		}
	}
	return 0;
}

int kh_mmu_write_protect(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end)
{
	struct kh_root *root;
	bool any = false;

	if (!kh_range_ok(mmu, as_id, start, end))
		return -EINVAL;
	kh_write_lock(&mmu->lock);
	root = kh_root_current(mmu, as_id);
	if (root)
		kh_for_each_leaf(mmu, root, start, end, protect_leaf, &any);
	kh_unlock(&mmu->lock);
	kh_mmu_flush_remote_cond(mmu, any);
	return any;
}

static unsigned int leaf_flags(const struct kh_format *fmt, uint64_t raw)
{
	return (raw & fmt->raw_write_all ? KH_LEAF_WRITE : 0) |
	       (kh_young(fmt, raw) ? KH_LEAF_YOUNG : 0) | (kh_dirty(fmt, raw) ? KH_LEAF_DIRTY : 0);
}

/* Leaves one level down that together are equivalent to `raw`. */
static void fill_split(const struct kh_format *fmt, uint64_t *table, uint64_t raw,
		       unsigned int level)
{
	uint64_t frames = kh_level_pages(fmt, level - 1) << (fmt->page_shift - 12);
	uint64_t pfn = kh_leaf_pfn(fmt, raw);

	for (uint64_t i = 0; i < 1ull << fmt->bits[level - 1]; i++)
		__atomic_store_n(&table[i],
				 kh_make_leaf(fmt, pfn + i * frames, level - 1,
					      leaf_flags(fmt, raw)),
				 __ATOMIC_RELAXED);
}

/*
 * A bit that hardware or a harvest changes meanwhile makes the swap fail, and the
 * table is filled again from the new leaf. Stage 2 sets an invalid entry first
 * (break-before-make).
 */
static int split_leaf(const struct kh_leaf_ctx *ctx)
{
	struct kh_mmu *mmu = ctx->mmu;
	const struct kh_format *fmt = &mmu->fmt;
	uint64_t *table, raw = ctx->old, value;

	if (ctx->level == 1)
		return 0;
	table = kh_table_alloc(mmu, ctx->level - 1);
	if (!table)
		return -ENOMEM;
	value = kh_make_table(fmt, kh_arena_pa(mmu->arena, table), ctx->level);
	do {
		if (!kh_leaf(fmt, raw, ctx->level)) {
			kh_table_free(mmu, table, ctx->level - 1);
			return 0;
		}
		fill_split(fmt, table, raw, ctx->level);
	} while (!__atomic_compare_exchange_n(ctx->entry, &raw,
					      fmt->id == KH_FMT_STAGE2 ? fmt->raw_frozen : value,
					      false, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE));
	if (fmt->id == KH_FMT_STAGE2) {
		kh_mmu_flush_remote(mmu);
		__atomic_store_n(ctx->entry, value, __ATOMIC_RELEASE);
	}
	if (kh_young(fmt, raw))
		kh_count(&mmu->counters.copied_young, (1ull << fmt->bits[ctx->level - 1]) - 1);
	*(bool *)ctx->arg = true;
	return KH_LOOK_AGAIN;
}

int kh_mmu_split(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end)
{
	struct kh_root *root;
	bool any = false;
	int result = 0;

	if (!kh_range_ok(mmu, as_id, start, end))
		return -EINVAL;
	kh_write_lock(&mmu->lock);
	root = kh_root_current(mmu, as_id);
	if (root)
		result = kh_for_each_leaf(mmu, root, start, end, split_leaf, &any);
	kh_unlock(&mmu->lock);
	kh_mmu_flush_remote_cond(mmu, any);
	return result < 0 ? result : any;
}

/* All are leaves, contiguous in memory, equal except for accessed and dirty state. */
static bool uniform(const struct kh_format *fmt, const uint64_t *table, unsigned int level)
{
	uint64_t first = kh_read_entry(table);
	uint64_t frames = kh_level_pages(fmt, level) << (fmt->page_shift - 12);
	uint64_t varies = fmt->young.raw_clear | fmt->dirty.raw_clear | kh_raw(fmt, fmt->addr_mask);
	uint64_t n = 1ull << fmt->bits[level];

	if (!kh_leaf(fmt, first, level) || kh_leaf_pfn(fmt, first) % (n * frames))
		return false;
	for (uint64_t i = 1; i < n; i++) {
		uint64_t raw = kh_read_entry(&table[i]);

		if (!kh_leaf(fmt, raw, level) || (raw ^ first) & ~varies ||
		    kh_leaf_pfn(fmt, raw) != kh_leaf_pfn(fmt, first) + i * frames)
			return false;
	}
	return true;
}

/* Remove the leaves of an unlinked table; returns the flags of one leaf that replaces them. */
static unsigned int drain(struct kh_mmu *mmu, uint64_t *table, unsigned int level)
{
	const struct kh_format *fmt = &mmu->fmt;
	unsigned int flags = 0;
	uint64_t young = 0;

	for (uint64_t i = 0; i < 1ull << fmt->bits[level]; i++) {
		uint64_t raw = __atomic_exchange_n(&table[i], fmt->raw_frozen, __ATOMIC_SEQ_CST);

		flags |= leaf_flags(fmt, raw);
		young += kh_young(fmt, raw);
	}
	if (young)
		kh_count(&mmu->counters.merged_young, young - 1);
	return flags;
}

static int collapse_locked(struct kh_mmu *mmu, struct kh_root *root, uint64_t gfn,
			   unsigned int level)
{
	const struct kh_format *fmt = &mmu->fmt;
	uint64_t *entry = kh_entry_find(mmu, root, gfn, level);
	uint64_t raw = entry ? kh_read_entry(entry) : 0;
	uint64_t *table, pfn;

	if (!kh_table(fmt, raw, level))
		return -EINVAL;
	table = kh_child(mmu, raw, level);
	if (!table || !uniform(fmt, table, level - 1))
		return -EINVAL;
	pfn = kh_leaf_pfn(fmt, kh_read_entry(table));
	/* From here on no walk enters the table, and no vCPU keeps an old translation. */
	__atomic_store_n(entry, fmt->raw_frozen, __ATOMIC_SEQ_CST);
	kh_mmu_flush_remote(mmu);
	__atomic_store_n(entry, kh_make_leaf(fmt, pfn, level, drain(mmu, table, level - 1)),
			 __ATOMIC_RELEASE);
	kh_table_retire(mmu, table, level - 1);
	return 0;
}

int kh_mmu_collapse(struct kh_mmu *mmu, uint32_t as_id, uint64_t gfn, uint32_t level)
{
	struct kh_root *root;
	int result = -EINVAL;

	if (!kh_range_ok(mmu, as_id, gfn, gfn) || level < 2 || level > mmu->fmt.max_leaf_level ||
	    gfn % kh_level_pages(&mmu->fmt, level))
		return -EINVAL;
	kh_write_lock(&mmu->lock);
	root = kh_root_current(mmu, as_id);
	if (root)
		result = collapse_locked(mmu, root, gfn, level);
	kh_unlock(&mmu->lock);
	return result;
}

/* Housekeeping. */

int kh_mmu_synchronize(struct kh_mmu *mmu)
{
	kh_epoch_synchronize(&mmu->epoch);
	return 0;
}

int kh_mmu_epoch_enter(struct kh_mmu *mmu)
{
	return (int)kh_epoch_enter(&mmu->epoch);
}

void kh_mmu_epoch_exit(struct kh_mmu *mmu, int slot)
{
	kh_epoch_exit(&mmu->epoch, (unsigned int)slot);
}

static uint64_t get(uint64_t *counter)
{
	return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

void kh_mmu_get_stats(struct kh_mmu *mmu, struct kh_mmu_stats *stats)
{
	struct kh_counters *c = &mmu->counters;

	memset(stats, 0, sizeof(*stats));
	stats->born_young = get(&c->born_young);
	stats->set_young = get(&c->set_young);
	stats->copied_young = get(&c->copied_young);
	stats->merged_young = get(&c->merged_young);
	stats->dropped_young = get(&c->dropped_young);
	stats->cleared_young = get(&c->cleared_young);
	stats->faults = get(&c->faults);
	stats->fault_retries = get(&c->fault_retries);
	stats->flushes = get(&c->flushes);
	stats->deferred = get(&c->deferred);
	stats->lock_waits = get(&mmu->lock.waits);
	stats->lock_wait_ns = get(&mmu->lock.wait_ns);
	stats->tlbs_dirty = get(&mmu->tlbs_dirty);
	stats->tlb_seq = get(&mmu->tlb_seq);
	stats->invalidate_seq = get(&mmu->invalidate_seq);
	stats->invalidate_in_progress = get(&mmu->invalidate_in_progress);
	pthread_mutex_lock(&mmu->epoch.lock);
	stats->retired = mmu->epoch.n_retired;
	stats->freed = mmu->epoch.freed;
	pthread_mutex_unlock(&mmu->epoch.lock);
	pthread_mutex_lock(&mmu->roots_lock);
	for (struct kh_root *root = mmu->roots; root; root = root->next)
		stats->roots++;
	pthread_mutex_unlock(&mmu->roots_lock);
	if (mmu->arena) {
		pthread_mutex_lock(&mmu->arena->lock);
		stats->table_bytes = mmu->arena->live;
		pthread_mutex_unlock(&mmu->arena->lock);
	}
}
