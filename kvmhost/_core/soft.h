/*
 * The soft engine: vCPUs that run access traces, not instructions, through a TLB and
 * the tables as hardware does, on as many threads as asked.
 */
#ifndef KVMHOST_SOFT_H
#define KVMHOST_SOFT_H

#include "mmu_ops.h"

#define KH_TRACE_STRIDE 0   /* gfns in steps of `stride`, repeated */
#define KH_TRACE_RANDOM 1   /* uniform */
#define KH_TRACE_QUANTILE 2 /* by a table of rank quantiles: zipf, hot and cold */
#define KH_TRACE_LIST 3     /* the given gfns in order, repeated */

/* kh_soft_config.flags */
#define KH_SOFT_PRIVATE 1 /* vCPU i has its own n_pages, from gfn_start + i * n_pages */
#define KH_SOFT_PHASED 2  /* shared pages: vCPU i starts at offset i/n */

struct kh_soft_config {
	uint32_t n_vcpus;
	uint32_t n_threads;
	uint32_t trace;
	uint32_t flags;
	uint64_t seed;
	uint64_t gfn_start;
	uint64_t n_pages;
	uint64_t stride;
	uint64_t n_accesses;     /* of each vCPU; 0: until stopped */
	uint32_t write_permille;
	uint32_t as_id;
	uint32_t tlb_sets;       /* powers of two; 0: no TLB */
	uint32_t tlb_ways;
	uint32_t huge_sets;
	uint32_t huge_ways;
	uint64_t scatter;        /* rank r is page (r * scatter) % n_pages; prime to n_pages */
	uint64_t list_address;   /* uint64_t[]: quantiles (n_list - 1 steps) or gfns */
	uint64_t n_list;
};

struct kh_soft_result {
	uint64_t accesses;
	uint64_t tlb_hits;
	uint64_t tlb_misses;
	uint64_t tlb_flushes;
	uint64_t faults;
	uint64_t fault_retries;
	uint64_t set_young;
	uint64_t errors;      /* accesses to no slot, or writes to a read-only one */
	uint64_t busy_ns;     /* time in the vCPU's own time slices */
	uint64_t last_gfn;
};

struct kh_soft;
struct kh_tlb;

/* The list is copied. */
int kh_soft_start(struct kh_soft **soft, struct kh_mmu *mmu,
		  const struct kh_soft_config *config);
void kh_soft_stop(struct kh_soft *soft);
/* Accesses done so far, by all vCPUs, as of each one's last turn. */
uint64_t kh_soft_progress(struct kh_soft *soft);
/* Wait up to timeout_ms for the threads to end: 1 if they have, 0 if not yet. */
int kh_soft_wait(struct kh_soft *soft, uint32_t timeout_ms);
/* Wait for the threads to end, fill in one result per vCPU, free everything. */
int kh_soft_finish(struct kh_soft *soft, struct kh_soft_result *results);
/* The next n gfns of one vCPU's trace (bit 63: a write), without running anything. */
int kh_soft_trace(const struct kh_soft_config *config, uint32_t vcpu, uint64_t *out, uint64_t n);

struct kh_tlb *kh_tlb_new(uint32_t sets, uint32_t ways, uint32_t huge_sets, uint32_t huge_ways,
			  uint32_t format, uint32_t page_shift);
void kh_tlb_free(struct kh_tlb *tlb);
/* Level of the cached translation of a gfn, 0 if there is none. */
int kh_tlb_lookup(struct kh_tlb *tlb, uint64_t gfn, int write);
void kh_tlb_insert(struct kh_tlb *tlb, uint64_t gfn, uint32_t level, int write);
void kh_tlb_flush(struct kh_tlb *tlb);
void kh_tlb_flush_page(struct kh_tlb *tlb, uint64_t gfn);

#endif
