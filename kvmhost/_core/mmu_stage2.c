#include "mmu_stage2_internal.h"

struct walk_data {
	const struct kh_mmu *mmu;
	const struct kh_walker *walker;
	uint64_t start;
	uint64_t addr;
	uint64_t end;
	struct kh_descent *descent;
};

static int walk_table(struct walk_data *data, uint64_t *table, unsigned int level);

/* -EAGAIN means that another thread changed the entry: a fault starts over, others go on. */
static bool goes_on(const struct kh_walker *walker, int result)
{
	return result == 0 || (result == -EAGAIN && walker->flags & KH_WALK_IGNORE_EAGAIN);
}

/* An empty entry, for a walk that skips those. */
static bool step_over(struct walk_data *data, const uint64_t *ptep, unsigned int level)
{
	const struct kh_format *fmt = &data->mmu->fmt;
	uint64_t span = kh_level_pages(fmt, level);

	if (!(data->walker->flags & KH_WALK_VALID) || kh_present(fmt, kh_read_entry(ptep)))
		return false;
	data->addr = (data->addr & ~(span - 1)) + span;
	return true;
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
	child = table ? kh_descend(data->mmu, data->descent, ctx.old, level, data->addr) : NULL;
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
		if (step_over(data, &table[i], level))
			continue;
		result = visit(data, &table[i], level);
		if (result)
			break;
	}
	return result;
}

int kh_stage2_walk(const struct kh_mmu *mmu, const struct kh_root *root, uint64_t start,
		   uint64_t end, const struct kh_walker *walker, struct kh_descent *descent)
{
	struct walk_data data = {
		.mmu = mmu,
		.walker = walker,
		.start = start,
		.addr = start,
		.end = end,
		.descent = descent,
	};

	descent->path[mmu->fmt.n_levels] = root->table;
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
	table = kh_descend(mmu, &harvest->descent, ctx->old, 2, first);
	last = last < ctx->end ? last : ctx->end;
	if (table)
		kh_harvest_run(harvest, table + kh_index(fmt, first, 1), first, last - first);
	return KH_WALK_SKIP;
}

/* In chunks, as stage2_apply_range() does, so that the epoch can advance between them. */
#define CHUNK_GFNS (1ull << 22)

void kh_stage2_harvest(struct kh_harvest *harvest, struct kh_root *root)
{
	struct kh_walker walker = {
		.cb = harvest_visitor,
		.arg = harvest,
		.flags = KH_WALK_LEAF | KH_WALK_TABLE_PRE | KH_WALK_SHARED | KH_WALK_VALID |
			 KH_WALK_IGNORE_EAGAIN,
	};
	uint64_t next;

	for (uint64_t start = harvest->start; start < harvest->end; start = next) {
		next = (start & ~(CHUNK_GFNS - 1)) + CHUNK_GFNS;
		next = next < harvest->end ? next : harvest->end;
		kh_stage2_walk(harvest->mmu, root, start, next, &walker,
			       &harvest->descent);
		kh_harvest_yield(harvest);
	}
}

struct leaf_walk {
	struct kh_mmu *mmu;
	kh_leaf_fn fn;
	void *arg;
};

static int leaf_visitor(const struct kh_visit_ctx *ctx)
{
	struct leaf_walk *walk = ctx->arg;
	const struct kh_format *fmt = &walk->mmu->fmt;
	struct kh_leaf_ctx leaf = {
		.mmu = walk->mmu,
		.entry = ctx->ptep,
		.old = ctx->old,
		.gfn = ctx->addr & ~(kh_level_pages(fmt, ctx->level) - 1),
		.level = ctx->level,
		.arg = walk->arg,
	};

	int result;

	if (!kh_leaf(fmt, ctx->old, ctx->level))
		return 0;
	/* The visitor reads the entry again after this, and enters a table that is new. */
	result = walk->fn(&leaf);
	return result < 0 ? result : 0;
}

int kh_stage2_for_each_leaf(struct kh_mmu *mmu, struct kh_root *root, uint64_t start,
			    uint64_t end, kh_leaf_fn fn, void *arg)
{
	struct leaf_walk walk = { .mmu = mmu, .fn = fn, .arg = arg };
	struct kh_walker walker = {
		.cb = leaf_visitor,
		.arg = &walk,
		.flags = KH_WALK_LEAF | KH_WALK_IGNORE_EAGAIN,
	};
	struct kh_descent descent = { 0 };

	return kh_stage2_walk(mmu, root, start, end, &walker, &descent);
}

/*
 * Break before make: the entry is invalid and locked (KVM_INVALID_PTE_LOCKED) until
 * stage2_make_pte(), so that no other fault changes it meanwhile.
 */
static bool stage2_try_break_pte(struct kh_mmu *mmu, const struct kh_visit_ctx *ctx)
{
	return kh_try_set(ctx->ptep, ctx->old, mmu->fmt.raw_frozen);
}

static void stage2_make_pte(uint64_t *ptep, uint64_t value)
{
	__atomic_store_n(ptep, value, __ATOMIC_RELEASE);
}

struct map_walk {
	struct kh_mmu *mmu;
	const struct kh_map *map;
	bool done;
};

static int map_table(struct map_walk *walk, const struct kh_visit_ctx *ctx)
{
	struct kh_mmu *mmu = walk->mmu;
	uint64_t *table = kh_table_alloc(mmu, ctx->level - 1);

	if (!table)
		return -ENOMEM;
	if (!stage2_try_break_pte(mmu, ctx)) {
		kh_table_free(mmu, table, ctx->level - 1);
		return -EAGAIN;
	}
	stage2_make_pte(ctx->ptep, kh_make_table(&mmu->fmt, kh_arena_pa(mmu->arena, table),
						 ctx->level));
	return 0;
}

static int map_visitor(const struct kh_visit_ctx *ctx)
{
	struct map_walk *walk = ctx->arg;
	const struct kh_map *map = walk->map;
	const struct kh_format *fmt = &walk->mmu->fmt;

	if (ctx->now == KH_WALK_TABLE_PRE)
		return ctx->level == map->level ? -EEXIST : 0;
	if (kh_present(fmt, ctx->old))
		return -EEXIST;
	if (ctx->old)
		return -EAGAIN; /* locked */
	if (ctx->level > map->level)
		return map_table(walk, ctx);
	if (!kh_try_set(ctx->ptep, 0, kh_make_leaf(fmt, map->pfn, map->level, map->flags)))
		return -EAGAIN;
	walk->done = true;
	return 0;
}

int kh_stage2_map(struct kh_mmu *mmu, struct kh_root *root, const struct kh_map *map)
{
	struct map_walk walk = { .mmu = mmu, .map = map };
	struct kh_walker walker = {
		.cb = map_visitor,
		.arg = &walk,
		.flags = KH_WALK_LEAF | KH_WALK_TABLE_PRE | KH_WALK_SHARED,
	};
	struct kh_descent descent = { 0 };
	int result = kh_stage2_walk(mmu, root, map->gfn, map->gfn + 1, &walker, &descent);

	if (result)
		return result;
	return walk.done ? 0 : -EAGAIN;
}

struct unmap_walk {
	struct kh_mmu *mmu;
	bool any;
};

static bool table_empty(const uint64_t *table, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		if (kh_read_entry(&table[i]))
			return false;
	return true;
}

/* Leaves are removed, and so is a table that becomes empty (its page count drops to 1 in KVM). */
static int unmap_visitor(const struct kh_visit_ctx *ctx)
{
	struct unmap_walk *walk = ctx->arg;
	struct kh_mmu *mmu = walk->mmu;
	const struct kh_format *fmt = &mmu->fmt;
	uint64_t *table;

	if (ctx->now == KH_WALK_LEAF) {
		if (kh_leaf(fmt, ctx->old, ctx->level)) {
			kh_leaf_remove(mmu, ctx->ptep, ctx->level, 0);
			walk->any = true;
		}
		return 0;
	}
	table = kh_child(mmu, ctx->old, ctx->level);
	/*
	 * Only the thread that removes the entry retires the table: a root's teardown may run
	 * concurrently.
	 */
	if (table && table_empty(table, 1ull << fmt->bits[ctx->level - 1]) &&
	    kh_try_set(ctx->ptep, ctx->old, 0))
		kh_table_retire(mmu, table, ctx->level - 1);
	return 0;
}

int kh_stage2_unmap(struct kh_mmu *mmu, struct kh_root *root, uint64_t start, uint64_t end,
		    bool *any)
{
	struct unmap_walk walk = { .mmu = mmu };
	struct kh_walker walker = {
		.cb = unmap_visitor,
		.arg = &walk,
		.flags = KH_WALK_LEAF | KH_WALK_TABLE_POST,
	};
	struct kh_descent descent = { 0 };
	int result = kh_stage2_walk(mmu, root, start, end, &walker, &descent);

	*any |= walk.any;
	return result;
}

struct count_walk {
	uint64_t eagain_gfn;
	uint64_t visited;
};

static int count_visitor(const struct kh_visit_ctx *ctx)
{
	struct count_walk *walk = ctx->arg;

	walk->visited++;
	return ctx->level == 1 && ctx->addr == walk->eagain_gfn ? -EAGAIN : 0;
}

int kh_mmu_stage2_count(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end,
			uint32_t flags, uint64_t eagain_gfn, uint64_t *visited)
{
	struct count_walk walk = { .eagain_gfn = eagain_gfn };
	struct kh_walker walker = {
		.cb = count_visitor,
		.arg = &walk,
		.flags = KH_WALK_LEAF | (flags & KH_COUNT_SHARED ? KH_WALK_SHARED : 0) |
			 (flags & KH_COUNT_IGNORE_EAGAIN ? KH_WALK_IGNORE_EAGAIN : 0),
	};
	struct kh_descent descent = { 0 };
	struct kh_root *root;
	unsigned int slot;
	int result = -EINVAL;

	if (mmu->fmt.id != KH_FMT_STAGE2 || !kh_range_ok(mmu, as_id, start, end))
		return -EINVAL;
	slot = kh_epoch_enter(&mmu->epoch);
	root = kh_root_current(mmu, as_id);
	if (root)
		result = kh_stage2_walk(mmu, root, start, end, &walker, &descent);
	kh_epoch_exit(&mmu->epoch, slot);
	*visited = walk.visited;
	return result;
}
