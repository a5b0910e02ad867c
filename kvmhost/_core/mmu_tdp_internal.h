/*
 * The tdp iterator: pre-order over [next_last_level_gfn, end) of one root.
 *
 * In the shape of arch/x86/kvm/mmu/tdp_iter.h.
 */
#ifndef KVMHOST_MMU_TDP_INTERNAL_H
#define KVMHOST_MMU_TDP_INTERNAL_H

#include "compat.h"

#include "mmu_internal.h"

struct tdp_iter {
	const struct kh_mmu *mmu;
	uint64_t next_last_level_gfn;          /* where a restart goes on */
	uint64_t yielded_gfn;                  /* next_last_level_gfn at the last yield */
	uint64_t *pt_path[KH_MAX_LEVEL + 1];   /* tables from the root down, by level */
	uint64_t *sptep;                       /* the current entry of the iterator */
	uint64_t gfn;                          /* first gfn that the entry maps */
	unsigned int root_level;
	unsigned int min_level;                /* deepest level that is visited */
	unsigned int level;
	uint64_t old_spte;                     /* snapshot of *sptep */
	bool valid;                            /* false: the walk is over */
	bool yielded;                          /* restart from the root on the next step */
	struct kh_descent *descent;            /* what the walk has met */
};

void tdp_iter_start(struct tdp_iter *iter, const struct kh_mmu *mmu, const struct kh_root *root,
		    unsigned int min_level, uint64_t next_last_level_gfn,
		    struct kh_descent *descent);
void tdp_iter_next(struct tdp_iter *iter);
void tdp_iter_restart(struct tdp_iter *iter);

#define for_each_tdp_pte_min_level(iter, mmu, root, min_level, start, end, descent)              \
	for (tdp_iter_start(&iter, mmu, root, min_level, start, descent);                        \
	     iter.valid && iter.gfn < (end); tdp_iter_next(&iter))

#endif
