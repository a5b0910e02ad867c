#include "mmu_stage2_internal.h"

struct walk_data {
	const struct kh_mmu *mmu;
	const struct kh_walker *walker;
	uint64_t start;
	uint64_t addr;
	uint64_t end;
	uint64_t *bad_pointers;
};

static int walk_table(struct walk_data *data, uint64_t *table, unsigned int level);

/* Of a shared walk, -EAGAIN only says that an entry was someone else's. */
static bool goes_on(const struct kh_walker *walker, int result)
{
	return result == 0 || (result == -EAGAIN && walker->flags & KH_WALK_SHARED);
}

static int visit(struct walk_data *data, uint64_t *ptep, unsigned int level)
{
	const struct kh_format *fmt = &data->mmu->fmt;
	const struct kh_walker *walker = data->walker;
	struct kh_visit_ctx ctx = {
		.ptep = ptep,
		.old = kh_read_entry(ptep),
		.arg = walker->arg,
		.start = data->start,
		.addr = data->addr,
		.end = data->end,
		.level = level,
		.flags = walker->flags,
	};
	bool table = kh_table(fmt, ctx.old, level);
	uint64_t span = kh_level_pages(fmt, level);
	uint64_t *child;
	int result = 0;

	if (table && walker->flags & KH_WALK_TABLE_PRE) {
		ctx.now = KH_WALK_TABLE_PRE;
		result = walker->cb(&ctx);
	}
	if (!table && walker->flags & KH_WALK_LEAF) {
		ctx.now = KH_WALK_LEAF;
		result = walker->cb(&ctx);
	}
	if (result == KH_WALK_SKIP) {
		data->addr = (data->addr & ~(span - 1)) + span;
		return 0;
	}
	if (!goes_on(walker, result))
		return result;
	/* The callback may have put a table where a leaf was, or the other way round. */
	if (walker->flags & (KH_WALK_LEAF | KH_WALK_TABLE_PRE)) {
		ctx.old = kh_read_entry(ptep);
		table = kh_table(fmt, ctx.old, level);
	}
	child = table ? kh_child(data->mmu, ctx.old, level, data->bad_pointers) : NULL;
	if (!child) {
		data->addr = (data->addr & ~(span - 1)) + span;
		return 0;
	}
	result = walk_table(data, child, level - 1);
	if (!goes_on(walker, result))
		return result;
	if (walker->flags & KH_WALK_TABLE_POST) {
		ctx.now = KH_WALK_TABLE_POST;
		result = walker->cb(&ctx);
	}
	return goes_on(walker, result) ? 0 : result;
}

static int walk_table(struct walk_data *data, uint64_t *table, unsigned int level)
{
	const struct kh_format *fmt = &data->mmu->fmt;
	uint64_t n = 1ull << fmt->bits[level];
	int result = 0;

	for (uint64_t i = kh_index(fmt, data->addr, level); i < n; i++) {
		if (data->addr >= data->end)
			break;
		result = visit(data, &table[i], level);
		if (result)
			break;
	}
	return result;
}

int kh_stage2_walk(const struct kh_mmu *mmu, const struct kh_root *root, uint64_t start,
		   uint64_t end, const struct kh_walker *walker, uint64_t *bad_pointers)
{
	struct walk_data data = {
		.mmu = mmu,
		.walker = walker,
		.start = start,
		.addr = start,
		.end = end,
		.bad_pointers = bad_pointers,
	};

	/* Concatenated start tables are one table with a wider index. */
	return walk_table(&data, root->table, mmu->fmt.n_levels);
}

/* Called before a level-2 table: its entries are taken as one run. */
static int harvest_visitor(const struct kh_visit_ctx *ctx)
{
	struct kh_harvest *harvest = ctx->arg;
	const struct kh_mmu *mmu = harvest->mmu;
	const struct kh_format *fmt = &mmu->fmt;
	uint64_t span = kh_level_pages(fmt, ctx->level);
	uint64_t first = ctx->addr;
	uint64_t last = (ctx->addr & ~(span - 1)) + span;
	uint64_t *table;

	if (ctx->now == KH_WALK_LEAF) {
		if (ctx->level > 1 && kh_leaf(fmt, ctx->old, ctx->level))
			kh_harvest_huge(harvest, ctx->ptep, ctx->old, first & ~(span - 1),
					ctx->level);
		return 0;
	}
	if (ctx->level != 2)
		return 0;
	table = kh_child(mmu, ctx->old, 2, &harvest->stats->bad_pointers);
	last = last < ctx->end ? last : ctx->end;
	if (table)
		kh_harvest_run(harvest, table + kh_index(fmt, first, 1), first, last - first);
	return KH_WALK_SKIP;
}

/* In chunks, as stage2_apply_range() does, so that the epoch can move on between them. */
#define CHUNK_GFNS (1ull << 18)

void kh_stage2_harvest(struct kh_harvest *harvest, struct kh_root *root)
{
	struct kh_walker walker = {
		.cb = harvest_visitor,
		.arg = harvest,
		.flags = KH_WALK_LEAF | KH_WALK_TABLE_PRE | KH_WALK_SHARED,
	};
	uint64_t next;

	for (uint64_t start = harvest->start; start < harvest->end; start = next) {
		next = (start & ~(CHUNK_GFNS - 1)) + CHUNK_GFNS;
		next = next < harvest->end ? next : harvest->end;
		kh_stage2_walk(harvest->mmu, root, start, next, &walker,
			       &harvest->stats->bad_pointers);
		kh_harvest_yield(harvest);
	}
}
