/* Aging leaf by leaf, as without the harvest, and the reverse: making leaves young. */
#include "mmu_internal.h"

static int test_leaf(const struct kh_leaf_ctx *ctx)
{
	*(uint64_t *)ctx->arg += kh_young(&ctx->mmu->fmt, ctx->old);
	return 0;
}

static int clear_leaf(const struct kh_leaf_ctx *ctx)
{
	const struct kh_format *fmt = &ctx->mmu->fmt;

	*(uint64_t *)ctx->arg += kh_clear_leaf(fmt, &fmt->young, ctx->entry, ctx->level);
	return 0;
}

static uint64_t age_lockless(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end,
			     kh_leaf_fn fn)
{
	unsigned int slot = kh_epoch_enter(&mmu->epoch);
	struct kh_root *root;
	uint64_t young = 0;

	kh_for_each_root_lockless(mmu, root, as_id)
		kh_for_each_leaf(mmu, root, start, end, fn, &young);
	kh_epoch_exit(&mmu->epoch, slot);
	return young;
}

int kh_mmu_test_young(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end)
{
	if (!kh_range_ok(mmu, as_id, start, end))
		return -EINVAL;
	return age_lockless(mmu, as_id, start, end, test_leaf) != 0;
}

int kh_mmu_clear_young(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end)
{
	uint64_t young;

	if (!kh_range_ok(mmu, as_id, start, end))
		return -EINVAL;
	young = age_lockless(mmu, as_id, start, end, clear_leaf);
	kh_count(&mmu->counters.cleared_young, young);
	return young != 0;
}

int kh_mmu_clear_flush_young(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end)
{
	uint64_t young;

	if (!kh_range_ok(mmu, as_id, start, end))
		return -EINVAL;
	kh_write_lock(&mmu->lock);
	young = age_lockless(mmu, as_id, start, end, clear_leaf);
	kh_count(&mmu->counters.cleared_young, young);
	kh_unlock(&mmu->lock);
	/*
	 * A stale translation is harmless here (no page is freed), so this does not
	 * wait for the deferred flushes of others: only young pages are flushed.
	 */
	if (young)
		kh_mmu_flush_remote(mmu);
	return young != 0;
}

/* A batch in the manner of the harvest: one run per table, not one walk per page. */
static uint64_t age_batch(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t n_pages,
			  uint32_t flags)
{
	uint64_t young[64] = { 0 }, coarse[64] = { 0 };
	struct kh_segment segment = { .gfn_start = start, .n_pages = n_pages, .as_id = as_id };
	struct kh_walk_stats stats = { 0 };
	uint64_t found = 0;

	kh_mmu_harvest(mmu, &segment, 1,
		       KH_HARVEST_CLEAR | (flags & KH_AGE_LOCKED ? KH_HARVEST_LOCKED : 0), NULL,
		       young, coarse, &stats);
	for (unsigned int i = 0; i < 64; i++)
		found += (uint64_t)__builtin_popcountll(young[i]);
	kh_count(&mmu->counters.cleared_young, stats.cleared);
	return found;
}

static uint64_t age_page(struct kh_mmu *mmu, uint32_t as_id, uint64_t gfn, uint32_t flags)
{
	uint64_t young;

	if (flags & KH_AGE_LOCKED)
		kh_write_lock(&mmu->lock);
	young = age_lockless(mmu, as_id, gfn, gfn + 1, clear_leaf);
	kh_count(&mmu->counters.cleared_young, young);
	if (flags & KH_AGE_LOCKED)
		kh_unlock(&mmu->lock);
	return young;
}

int64_t kh_mmu_age(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end,
		   uint64_t batch_pages, uint32_t flags)
{
	uint64_t total = 0;

	if (!kh_range_ok(mmu, as_id, start, end) || batch_pages < 1 || batch_pages > 4096)
		return -EINVAL;
	for (uint64_t gfn = start; gfn < end; gfn += batch_pages) {
		uint64_t n = end - gfn < batch_pages ? end - gfn : batch_pages;
		uint64_t young = batch_pages == 1 ? age_page(mmu, as_id, gfn, flags)
						  : age_batch(mmu, as_id, gfn, n, flags);

		total += young;
		for (; flags & KH_AGE_FLUSH && young; young--)
			kh_mmu_flush_remote(mmu);
	}
	return (int64_t)total;
}

struct mark_arg {
	uint64_t start;
	uint64_t end;
	const uint64_t *bitmap;
	uint64_t marked;
};

static bool marked(const struct mark_arg *arg, uint64_t gfn, uint64_t pages)
{
	uint64_t first = gfn > arg->start ? gfn : arg->start;
	uint64_t last = gfn + pages < arg->end ? gfn + pages : arg->end;

	if (!arg->bitmap)
		return true;
	for (; first < last; first++)
		if (arg->bitmap[(first - arg->start) / 64] >> ((first - arg->start) % 64) & 1)
			return true;
	return false;
}

static int mark_leaf(const struct kh_leaf_ctx *ctx)
{
	const struct kh_format *fmt = &ctx->mmu->fmt;
	struct mark_arg *arg = ctx->arg;
	uint64_t raw = ctx->old;

	if (!marked(arg, ctx->gfn, kh_level_pages(fmt, ctx->level)))
		return 0;
	while (kh_leaf(fmt, raw, ctx->level) && !kh_young(fmt, raw)) {
		if (__atomic_compare_exchange_n(ctx->entry, &raw, raw | fmt->young.raw_clear, false,
						__ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE)) {
			arg->marked++;
			break;
		}
	}
	return 0;
}

int64_t kh_mmu_mark_young(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t n_pages,
			  const uint64_t *bitmap)
{
	struct mark_arg arg = { .start = start, .end = start + n_pages, .bitmap = bitmap };
	unsigned int slot;
	struct kh_root *root;

	if (!kh_range_ok(mmu, as_id, start, arg.end))
		return -EINVAL;
	slot = kh_epoch_enter(&mmu->epoch);
	root = kh_root_current(mmu, as_id);
	if (root)
		kh_for_each_leaf(mmu, root, start, arg.end, mark_leaf, &arg);
	kh_epoch_exit(&mmu->epoch, slot);
	kh_count(&mmu->counters.set_young, arg.marked);
	return (int64_t)arg.marked;
}
