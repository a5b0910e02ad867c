#ifndef KVMHOST_SOFT_INTERNAL_H
#define KVMHOST_SOFT_INTERNAL_H

#include "mmu_internal.h"
#include "soft.h"

struct kh_tlb_entry {
	uint64_t tag;   /* gfn, in units of the level's pages */
	uint64_t used;  /* clock of the last use; 0: empty */
	uint32_t level; /* 0: empty */
	uint32_t write;
};

struct kh_tlb_part {
	uint32_t sets;
	uint32_t ways;
	struct kh_tlb_entry *entries;
};

struct kh_tlb {
	struct kh_tlb_part part[2]; /* base pages, huge pages */
	uint32_t shift[4];
	uint64_t clock;
};

int kh_tlb_init(struct kh_tlb *tlb, uint32_t sets, uint32_t ways, uint32_t huge_sets,
		uint32_t huge_ways, const struct kh_format *fmt);
void kh_tlb_destroy(struct kh_tlb *tlb);

#endif
