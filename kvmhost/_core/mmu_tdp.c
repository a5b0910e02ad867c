#include "mmu_tdp_internal.h"

#include <string.h>

/* Point the iterator at the entry for next_last_level_gfn on its level. */
static void tdp_iter_refresh_sptep(struct tdp_iter *iter)
{
	const struct kh_format *fmt = &iter->mmu->fmt;

	iter->gfn = iter->next_last_level_gfn & ~(kh_level_pages(fmt, iter->level) - 1);
	iter->sptep = iter->pt_path[iter->level] +
		      kh_index(fmt, iter->next_last_level_gfn, iter->level);
	iter->old_spte = kh_read_entry(iter->sptep);
}

void tdp_iter_restart(struct tdp_iter *iter)
{
	iter->yielded = false;
	iter->yielded_gfn = iter->next_last_level_gfn;
	iter->level = iter->root_level;
	tdp_iter_refresh_sptep(iter);
	iter->valid = true;
}

void tdp_iter_start(struct tdp_iter *iter, const struct kh_mmu *mmu, const struct kh_root *root,
		    unsigned int min_level, uint64_t next_last_level_gfn,
		    struct kh_descent *descent)
{
	memset(iter, 0, sizeof(*iter));
	iter->descent = descent;
	descent->path[mmu->fmt.n_levels] = root->table;
	iter->mmu = mmu;
	iter->root_level = mmu->fmt.n_levels;
	iter->min_level = min_level;
	iter->next_last_level_gfn = next_last_level_gfn;
	iter->pt_path[iter->root_level] = root->table;
	tdp_iter_restart(iter);
}

static bool try_step_down(struct tdp_iter *iter)
{
	uint64_t *child;

	if (iter->level == iter->min_level)
		return false;
	/* The entry may have changed since the snapshot: follow the current one. */
	iter->old_spte = kh_read_entry(iter->sptep);
	if (!kh_table(&iter->mmu->fmt, iter->old_spte, iter->level))
		return false;
	child = kh_descend(iter->mmu, iter->descent, iter->old_spte, iter->level, iter->gfn);
	if (!child)
		return false;
	iter->level--;
	iter->pt_path[iter->level] = child;
	tdp_iter_refresh_sptep(iter);
	return true;
}

static bool try_step_side(struct tdp_iter *iter)
{
	const struct kh_format *fmt = &iter->mmu->fmt;

	if (kh_index(fmt, iter->gfn, iter->level) == (1ull << fmt->bits[iter->level]) - 1)
		return false;
	iter->gfn += kh_level_pages(fmt, iter->level);
	iter->next_last_level_gfn = iter->gfn;
	iter->sptep++;
	iter->old_spte = kh_read_entry(iter->sptep);
	return true;
}

static bool try_step_up(struct tdp_iter *iter)
{
	if (iter->level == iter->root_level)
		return false;
	iter->level++;
	/* Not read again here: the next step needs only the position. */
	iter->gfn &= ~(kh_level_pages(&iter->mmu->fmt, iter->level) - 1);
	iter->sptep = iter->pt_path[iter->level] +
		      kh_index(&iter->mmu->fmt, iter->gfn, iter->level);
	return true;
}

void tdp_iter_next(struct tdp_iter *iter)
{
	if (iter->yielded) {
		tdp_iter_restart(iter);
		return;
	}
	if (try_step_down(iter))
		return;
	do {
		if (try_step_side(iter))
			return;
	} while (try_step_up(iter));
	iter->valid = false;
}

/* Yield, at most once per position, so that the walk always makes progress. */
static bool tdp_iter_cond_yield(struct tdp_iter *iter, struct kh_harvest *harvest)
{
	if (iter->next_last_level_gfn == iter->yielded_gfn)
		return false;
	iter->yielded = kh_harvest_yield(harvest);
	return iter->yielded;
}

/* The part of a last-level table that lies in the range, as one run of entries. */
static void harvest_table(struct tdp_iter *iter, struct kh_harvest *harvest)
{
	const struct kh_format *fmt = &iter->mmu->fmt;
	uint64_t first = iter->gfn > harvest->start ? iter->gfn : harvest->start;
	uint64_t last = iter->gfn + kh_level_pages(fmt, iter->level);
	uint64_t *table = kh_descend(iter->mmu, iter->descent, iter->old_spte, iter->level, first);

	last = last < harvest->end ? last : harvest->end;
	if (table)
		kh_harvest_run(harvest, table + kh_index(fmt, first, 1), first, last - first);
}

/*
 * The last level is processed one table at a time instead of entry by entry, which
 * makes a batch fast.
 */
void kh_tdp_harvest(struct kh_harvest *harvest, struct kh_root *root)
{
	const struct kh_format *fmt = &harvest->mmu->fmt;
	struct tdp_iter iter;

	for_each_tdp_pte_min_level(iter, harvest->mmu, root, 2, harvest->start, harvest->end,
				   &harvest->descent) {
		if (tdp_iter_cond_yield(&iter, harvest))
			continue;
		if (kh_leaf(fmt, iter.old_spte, iter.level))
			kh_harvest_huge(harvest, iter.sptep, iter.old_spte, iter.gfn, iter.level);
		else if (iter.level == 2 && kh_present(fmt, iter.old_spte))
			harvest_table(&iter, harvest);
	}
}

int kh_tdp_for_each_leaf(struct kh_mmu *mmu, struct kh_root *root, uint64_t start, uint64_t end,
			 kh_leaf_fn fn, void *arg)
{
	struct kh_descent descent = { 0 };
	struct tdp_iter iter;
	int result;

	for_each_tdp_pte_min_level(iter, mmu, root, 1, start, end, &descent) {
		struct kh_leaf_ctx ctx = {
			.mmu = mmu,
			.entry = iter.sptep,
			.old = iter.old_spte,
			.gfn = iter.gfn,
			.level = iter.level,
			.arg = arg,
		};

		if (!kh_leaf(&mmu->fmt, iter.old_spte, iter.level))
			continue;
		/* The next step enters a new table, so a second read is not needed. */
		result = fn(&ctx);
		if (result < 0)
			return result;
	}
	return 0;
}

/* Link a new, empty table into an empty entry (tdp_mmu_link_sp). */
static int link_table(struct tdp_iter *iter, struct kh_mmu *mmu)
{
	uint64_t *table = kh_table_alloc(mmu, iter->level - 1);
	uint64_t pa;

	if (!table)
		return -ENOMEM;
	pa = kh_arena_pa(mmu->arena, table);
	if (kh_try_set(iter->sptep, iter->old_spte, kh_make_table(&mmu->fmt, pa, iter->level)))
		return 0;
	/* Another fault was first: use its table. */
	kh_table_free(mmu, table, iter->level - 1);
	return -EAGAIN;
}

int kh_tdp_map(struct kh_mmu *mmu, struct kh_root *root, const struct kh_map *map)
{
	const struct kh_format *fmt = &mmu->fmt;
	struct kh_descent descent = { 0 };
	struct tdp_iter iter;
	int result;

	for_each_tdp_pte_min_level(iter, mmu, root, map->level, map->gfn, map->gfn + 1, &descent) {
		if (kh_table(fmt, iter.old_spte, iter.level) && iter.level > map->level)
			continue;
		if (kh_present(fmt, iter.old_spte))
			return -EEXIST;
		if (iter.old_spte)
			return -EAGAIN; /* frozen */
		if (iter.level == map->level)
			return kh_try_set(iter.sptep, 0,
					  kh_make_leaf(fmt, map->pfn, map->level, map->flags)) ?
				0 : -EAGAIN;
		result = link_table(&iter, mmu);
		if (result < 0)
			return result;
	}
	return -EAGAIN;
}
