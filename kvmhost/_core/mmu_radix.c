/*
 * The radix lookup, in the shape of find_kvm_secondary_pte() in
 * arch/powerpc/kvm/book3s_64_mmu_radix.c: from the root to the entry of one gfn.
 */
#include "mmu_radix_internal.h"

uint64_t *kh_radix_find(const struct kh_mmu *mmu, const struct kh_root *root, uint64_t gfn,
			unsigned int *shift, unsigned int *level, uint64_t *bad_pointers)
{
	const struct kh_format *fmt = &mmu->fmt;
	uint64_t *table = root->table;

	for (unsigned int at = fmt->n_levels;; at--) {
		uint64_t *entry = table + kh_index(fmt, gfn, at);
		uint64_t raw = kh_read_entry(entry);

		*shift = fmt->shift[at];
		*level = at;
		if (at == 1 || kh_leaf(fmt, raw, at))
			return entry;
		/*
		 * Nothing below: the hole is as large as this entry. The 2023 loop
		 * left *shift as it was here, and stepped by whatever that held.
		 */
		if (!kh_present(fmt, raw))
			return NULL;
		table = kh_child(mmu, raw, at, bad_pointers);
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
						&harvest->stats->bad_pointers);
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
