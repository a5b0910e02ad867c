/* Operations on the tables that this layer owns, and the lock of each. */
#ifndef KVMHOST_MMU_OPS_H
#define KVMHOST_MMU_OPS_H

#include "mmu_core.h"

/* kh_map.flags */
#define KH_LEAF_WRITE 1
#define KH_LEAF_YOUNG 2
#define KH_LEAF_DIRTY 4

/* kh_mmu_unmap flags */
#define KH_DEFER_FLUSH 1 /* raise the dirty mark instead of flushing */

/* kh_mmu_age flags: how a range is aged, for comparison */
#define KH_AGE_LOCKED 1 /* hold the MMU lock for write around every page or batch */
#define KH_AGE_FLUSH 2  /* flush remote TLBs once for every young page */

/* kh_mmu_stage2_count flags */
#define KH_COUNT_SHARED 1
#define KH_COUNT_IGNORE_EAGAIN 2

/* kh_slot.flags */
#define KH_SLOT_READ_ONLY 1
#define KH_SLOT_LOG_DIRTY 2

struct kh_map {
	uint64_t gfn;
	uint64_t pfn;   /* in 4 KiB frames, for every base page size */
	uint32_t as_id;
	uint32_t level;
	uint32_t flags;
	uint32_t reserved;
};

struct kh_slot {
	uint64_t gfn_start;
	uint64_t n_pages;
	uint64_t pfn_start;
	uint32_t as_id;
	uint32_t flags;
	uint32_t max_level;
	uint32_t reserved;
};

/* Every event that sets, copies or clears a young bit is counted, so that the counters balance. */
struct kh_mmu_stats {
	uint64_t born_young;    /* leaves installed young by map or fault */
	uint64_t set_young;     /* bits set by hardware, or by the fault handler for it */
	uint64_t copied_young;  /* copies that a split made beyond the first */
	uint64_t merged_young;  /* bits that a collapse merged into one beyond the first */
	uint64_t dropped_young; /* young bits of removed leaves */
	uint64_t cleared_young; /* bits cleared by clear_young and clear_flush_young */
	uint64_t faults;
	uint64_t fault_retries; /* faults retried after a race with an invalidation or a fault */
	uint64_t flushes;
	uint64_t deferred;      /* flushes deferred with the dirty mark */
	uint64_t lock_waits;
	uint64_t lock_wait_ns;
	uint64_t table_bytes;   /* table pages in use */
	uint64_t retired;       /* table pages that wait for readers to leave */
	uint64_t freed;         /* retired objects freed so far */
	uint64_t roots;
	uint64_t tlbs_dirty;
	uint64_t tlb_seq;
	uint64_t invalidate_seq;
	uint64_t invalidate_in_progress;
};

int kh_mmu_open(struct kh_mmu **mmu, const struct kh_mmu_config *config);
/*
 * Replace the memslots: sorted by (as_id, gfn_start), not overlapping. Waits until no
 * fault uses the old ones; not from inside an epoch.
 */
int kh_mmu_set_slots(struct kh_mmu *mmu, const struct kh_slot *slots, uint32_t n_slots);
void kh_mmu_get_stats(struct kh_mmu *mmu, struct kh_mmu_stats *stats);

/* Map one leaf into an empty entry: -EEXIST if it is not empty. Lock: as a fault. */
int kh_mmu_map(struct kh_mmu *mmu, const struct kh_map *map);
/* The same for `n` leaves, contiguous in gfn and pfn. */
int kh_mmu_map_many(struct kh_mmu *mmu, const struct kh_map *map, uint64_t n);
/* Remove all leaves that overlap the range; returns 1 if there were any. Lock: write. */
int kh_mmu_unmap(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end,
		 uint32_t flags);
int kh_mmu_write_protect(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end);
/* Replace huge leaves in the range by tables, down to level 1. */
int kh_mmu_split(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end);
/* Collapse the table at gfn into one leaf of `level`: -EINVAL if it is not uniform. */
int kh_mmu_collapse(struct kh_mmu *mmu, uint32_t as_id, uint64_t gfn, uint32_t level);
int kh_mmu_test_young(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end);
/* Lock: none. Returns 1 if any leaf was young. */
int kh_mmu_clear_young(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end);
/* As before 2023: the MMU lock for write, then a flush if any leaf was young. */
int kh_mmu_clear_flush_young(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end);
/*
 * Age a range in batches of batch_pages; a batch of 1 is the method of
 * clear_flush_young, a walk from the root for each page. Returns the number of
 * young pages found.
 */
int64_t kh_mmu_age(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end,
		   uint64_t batch_pages, uint32_t flags);
/*
 * Make leaves young: for a tracker that observes accesses elsewhere and applies
 * them to the model. Bit i of `bitmap` is gfn start + i; NULL is all. Lock: none.
 * Returns how many leaves it made young that were old.
 */
int64_t kh_mmu_mark_young(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t n_pages,
			  const uint64_t *bitmap);
int kh_mmu_zap_all(struct kh_mmu *mmu);
/*
 * First half of kh_mmu_zap_all: new roots; the old ones stay in the list, invalid, with
 * their tables.
 */
int kh_mmu_invalidate_roots(struct kh_mmu *mmu);
int kh_mmu_zap_invalidated_roots(struct kh_mmu *mmu);
/* The memory is being freed: zap everything, and refuse all later operations. */
int kh_mmu_release(struct kh_mmu *mmu);
/* Wait until no walk can hold anything that was unlinked so far, and free it. */
int kh_mmu_synchronize(struct kh_mmu *mmu);
/* For tests: stay inside an epoch as a walk would, until kh_mmu_epoch_exit(). */
int kh_mmu_epoch_enter(struct kh_mmu *mmu);
void kh_mmu_epoch_exit(struct kh_mmu *mmu, int slot);
/*
 * For tests, stage 2 only: visit the leaves and invalid entries of a range with a callback
 * that loses a race (-EAGAIN) at eagain_gfn; the result is that of the walk.
 */
int kh_mmu_stage2_count(struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end,
			uint32_t flags, uint64_t eagain_gfn, uint64_t *visited);

/* A vCPU's access as hardware performs it: 0, or 1 to 4 for a fault (see mmu_fault.c). */
int kh_mmu_access(struct kh_mmu *mmu, uint32_t as_id, uint64_t gfn, int write);
/* The same, with faults handled: -EFAULT without slot, -EROFS for a read-only one. */
int kh_mmu_touch(struct kh_mmu *mmu, uint32_t as_id, uint64_t gfn, int write);
/* A fault in its two halves: an event between them may invalidate the fault (-EAGAIN). */
uint64_t kh_mmu_fault_begin(struct kh_mmu *mmu);
int kh_mmu_fault_finish(struct kh_mmu *mmu, uint32_t as_id, uint64_t gfn, int write,
			uint64_t seq);

/* mmu_notifier_invalidate_range_start/end for gfn ranges of any address space. */
int kh_mmu_invalidate_start(struct kh_mmu *mmu, const struct kh_segment *ranges, uint32_t n);
int kh_mmu_invalidate_end(struct kh_mmu *mmu, const struct kh_segment *ranges, uint32_t n);
int kh_mmu_invalidate_retry(struct kh_mmu *mmu, uint64_t gfn, uint64_t seq);

/* Flush every vCPU's TLB; lowers the dirty mark by its value before the flush. */
void kh_mmu_flush_remote(struct kh_mmu *mmu);
/* Flush if requested, or if a flush was deferred. */
int kh_mmu_flush_remote_cond(struct kh_mmu *mmu, int wanted);

#endif
