/*
 * The radix lookup, in the shape of find_kvm_secondary_pte() in
 * arch/powerpc/kvm/book3s_64_mmu_radix.c: from the root to the entry of one gfn.
 */
#include "mmu_radix_internal.h"

uint64_t *kh_radix_find(const struct kh_mmu *mmu, const struct kh_root *root, uint64_t gfn,
			unsigned int *shift, unsigned int *level, struct kh_descent *descent)
{
	const struct kh_format *fmt = &mmu->fmt;
	uint64_t *table = root->table;

	descent->path[fmt->n_levels] = table;
	for (unsigned int at = fmt->n_levels;; at--) {
		uint64_t *entry = table + kh_index(fmt, gfn, at);
		uint64_t raw = kh_read_entry(entry);

		*shift = fmt->shift[at];
		*level = at;
		if (at == 1 || kh_leaf(fmt, raw, at))
			return entry;
		/*
		 * No table below: the hole is as large as this entry. The 2023 loop
		 * did not set *shift here, and stepped by its stale value.
		 */
		if (!kh_present(fmt, raw))
			return NULL;
		table = kh_descend(mmu, descent, raw, at, gfn);
		if (!table)
			return NULL;
	}
}

/* One lookup for each last-level table; its entries are neighbours. */
void kh_radix_harvest(struct kh_harvest *harvest, struct kh_root *root)
{
	const struct kh_format *fmt = &harvest->mmu->fmt;
	unsigned int shift, level;
	uint64_t next;

	for (uint64_t gfn = harvest->start; gfn < harvest->end; gfn = next) {
		uint64_t *entry = kh_radix_find(harvest->mmu, root, gfn, &shift, &level,
						&harvest->descent);
		uint64_t span = 1ull << (shift - fmt->page_shift);

		if (level == 1)
			span = kh_level_pages(fmt, 2);
		next = (gfn & ~(span - 1)) + span;
		next = next < harvest->end ? next : harvest->end;
		if (entry && level == 1)
			kh_harvest_run(harvest, entry, gfn, next - gfn);
		else if (entry)
			kh_harvest_huge(harvest, entry, kh_read_entry(entry), gfn & ~(span - 1),
					level);
		kh_harvest_yield(harvest);
	}
}

int kh_radix_for_each_leaf(struct kh_mmu *mmu, struct kh_root *root, uint64_t start,
			   uint64_t end, kh_leaf_fn fn, void *arg)
{
	const struct kh_format *fmt = &mmu->fmt;
	struct kh_leaf_ctx ctx = { .mmu = mmu, .arg = arg };
	struct kh_descent descent = { 0 };
	unsigned int shift;
	int result;

	for (uint64_t gfn = start, span; gfn < end; gfn = span ? (gfn & ~(span - 1)) + span : gfn) {
		ctx.entry = kh_radix_find(mmu, root, gfn, &shift, &ctx.level, &descent);
		span = 1ull << (shift - fmt->page_shift);
		if (!ctx.entry)
			continue;
		ctx.old = kh_read_entry(ctx.entry);
		ctx.gfn = gfn & ~(span - 1);
		if (!kh_leaf(fmt, ctx.old, ctx.level))
			continue;
		result = fn(&ctx);
		if (result < 0)
			return result;
		if (result == KH_LOOK_AGAIN)
			span = 0;
	}
	return 0;
}

/*
 * In the shape of kvmppc_create_pte(). No other thread changes the tables
 * meanwhile: the lock is held for write, as the kernel holds its spinlock there.
 */
int kh_radix_map(struct kh_mmu *mmu, struct kh_root *root, const struct kh_map *map)
{
	const struct kh_format *fmt = &mmu->fmt;
	uint64_t *table = root->table;
	uint64_t *entry, raw;

	for (unsigned int level = fmt->n_levels;; level--) {
		entry = table + kh_index(fmt, map->gfn, level);
		raw = kh_read_entry(entry);
		if (level == map->level)
			break;
		if (kh_leaf(fmt, raw, level))
			return -EEXIST;
		if (!kh_present(fmt, raw)) {
			table = kh_table_alloc(mmu, level - 1);
			if (!table)
				return -ENOMEM;
			raw = kh_make_table(fmt, kh_arena_pa(mmu->arena, table), level);
			__atomic_store_n(entry, raw, __ATOMIC_RELEASE);
		}
		table = kh_child(mmu, raw, level);
		if (!table)
			return -EFAULT;
	}
	if (raw)
		return -EEXIST;
	__atomic_store_n(entry, kh_make_leaf(fmt, map->pfn, map->level, map->flags),
			 __ATOMIC_RELEASE);
	return 0;
}
