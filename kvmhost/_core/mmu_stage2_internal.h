/*
 * The stage-2 visitor, in the shape of kvm_pgtable_walk() in
 * arch/arm64/kvm/hyp/pgtable.c: a callback at leaves, before tables, after them.
 */
#ifndef KVMHOST_MMU_STAGE2_INTERNAL_H
#define KVMHOST_MMU_STAGE2_INTERNAL_H

#include "compat.h"

#include "mmu_internal.h"

#define KH_WALK_LEAF 1       /* leaves, invalid entries included */
#define KH_WALK_TABLE_PRE 2  /* before the entries of a table */
#define KH_WALK_TABLE_POST 4 /* after them */
#define KH_WALK_SHARED 8     /* others change the tables at the same time */
#define KH_WALK_VALID 16     /* no callback for invalid entries (not in the kernel) */
/*
 * Go on after -EAGAIN, which otherwise ends the walk: KVM_PGTABLE_WALK_IGNORE_EAGAIN. Before
 * fedbe023f079 ("KVM: arm64: Invert KVM_PGTABLE_WALK_HANDLE_FAULT to fix pKVM walkers") a
 * flag of fault handlers had the opposite sense. Whether a walk is shared decides neither.
 */
#define KH_WALK_IGNORE_EAGAIN 32

/* A TABLE_PRE callback returns it to have done the table's entries itself. */
#define KH_WALK_SKIP 1

struct kh_visit_ctx {
	uint64_t *ptep;
	uint64_t old;       /* raw entry when the visitor read it */
	void *arg;
	uint64_t start;     /* gfns; constant during a walk */
	uint64_t addr;
	uint64_t end;
	unsigned int level; /* 1 is the last one; native levels count the other way */
	unsigned int flags;
	unsigned int now;   /* which of the KH_WALK_* caused this call */
};

struct kh_walker {
	/* 0: continue; KH_WALK_SKIP; -EAGAIN: lost a race, see KH_WALK_IGNORE_EAGAIN */
	int (*cb)(const struct kh_visit_ctx *ctx);
	void *arg;
	unsigned int flags;
};

int kh_stage2_walk(const struct kh_mmu *mmu, const struct kh_root *root, uint64_t start,
		   uint64_t end, const struct kh_walker *walker, struct kh_descent *descent);

#endif
