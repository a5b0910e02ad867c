/* The secondary MMU's own structures; design and locking are in docs/mmu.md. */
#ifndef KVMHOST_MMU_INTERNAL_H
#define KVMHOST_MMU_INTERNAL_H

#include "compat.h"

#include <pthread.h>

#include "mmu_arena_internal.h"
#include "mmu_core.h"
#include "mmu_epoch_internal.h"
#include "mmu_format_internal.h"
#include "mmu_ops.h"

struct kh_memory {
	struct kh_region *regions;
	uint32_t n_regions;
};

/* Host bytes of [pa, pa + n_bytes), NULL where no region holds all of them. */
static inline void *kh_memory_host(const struct kh_memory *memory, uint64_t pa, uint64_t n_bytes)
{
	for (uint32_t i = 0; i < memory->n_regions; i++) {
		const struct kh_region *region = &memory->regions[i];
		uint64_t offset = pa - region->pa_start;

		/* An address below the region wraps to a large offset. */
		if (offset < region->n_bytes && n_bytes <= region->n_bytes - offset)
			return (void *)(uintptr_t)(region->host_address + offset);
	}
	return NULL;
}

/* The MMU lock, with the time spent waiting for it. */
struct kh_rwlock {
	pthread_rwlock_t lock;
	uint64_t waits;
	uint64_t wait_ns;
};

void kh_rwlock_init(struct kh_rwlock *lock);
void kh_read_lock(struct kh_rwlock *lock);
void kh_write_lock(struct kh_rwlock *lock);

static inline void kh_unlock(struct kh_rwlock *lock)
{
	pthread_rwlock_unlock(&lock->lock);
}

/* A root and the tables under it. Readers find roots inside an epoch. */
struct kh_root {
	struct kh_root *next;
	uint64_t pa;
	uint64_t *table;
	uint32_t as_id;
	uint32_t refcount; /* 0: being freed, walks skip it */
	bool invalid;      /* being torn down: aged, never mapped into */
	bool zapping;      /* under roots_lock: a thread is tearing it down */
};

/*
 * Roots of one address space, inside an epoch: including a root that is being torn
 * down while it has references. A root without references is skipped.
 */
#define kh_for_each_root_lockless(mmu, root, as)                                                 \
	for (root = __atomic_load_n(&(mmu)->roots, __ATOMIC_ACQUIRE); root;                      \
	     root = __atomic_load_n(&root->next, __ATOMIC_ACQUIRE))                              \
		if (root->as_id != (as) ||                                                       \
		    !__atomic_load_n(&root->refcount, __ATOMIC_ACQUIRE)) {                       \
		} else

/* A snapshot of the memslots, replaced as a whole. */
struct kh_slot_array {
	uint32_t n;
	struct kh_slot slots[];
};

struct kh_counters {
	uint64_t born_young, set_young, copied_young, merged_young, dropped_young, cleared_young;
	uint64_t faults, fault_retries, flushes, deferred;
};

struct kh_mmu {
	struct kh_format fmt;
	struct kh_memory memory;
	struct kh_arena *arena; /* NULL: tables that this layer does not own */
	struct kh_root *roots;
	pthread_mutex_t roots_lock;
	struct kh_epoch epoch;
	struct kh_rwlock lock;
	struct kh_slot_array *slots; /* NULL: no gfn may be faulted in */
	struct kh_counters counters;
	uint32_t flags;
	uint32_t n_as;
	bool released;
	bool range_retry;    /* mmu_invalidate_retry_gfn(), not mmu_invalidate_retry() */
	uint64_t tlb_seq;    /* vCPUs whose copy differs empty their TLB */
	uint64_t tlbs_dirty; /* entry changes whose TLB flush is deferred */
	/* Written under the MMU lock held for write, read under it held for read. */
	uint64_t invalidate_in_progress;
	uint64_t invalidate_start;
	uint64_t invalidate_end;
	uint64_t invalidate_seq;
};

static inline void kh_count(uint64_t *counter, uint64_t n)
{
	__atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

/* Set an entry if its value is still the expected one. */
static inline bool kh_try_set(uint64_t *entry, uint64_t old, uint64_t value)
{
	return __atomic_compare_exchange_n(entry, &old, value, false, __ATOMIC_SEQ_CST,
					   __ATOMIC_ACQUIRE);
}

/* What a walk from the root down has met: its tables by level, and the entries it refused. */
struct kh_descent {
	const uint64_t *path[KH_MAX_LEVEL + 1];
	uint64_t n_bad;
	struct kh_bad_entry first;
};

/* One harvest over one range; walkers pass leaves to kh_harvest_*(). */
struct kh_harvest {
	struct kh_mmu *mmu;
	struct kh_descent descent;
	const struct kh_probe *probe;
	uint64_t start; /* gfns of this part */
	uint64_t end;
	uint64_t bit;   /* of `start` */
	struct kh_root *root;
	bool clear;
	bool careful; /* read each entry again before clearing it */
	bool tables_only; /* check the tables above the last level, and look at no leaf */
	bool may_yield;
	unsigned int epoch_slot;
	const uint64_t *mask;
	uint64_t *young;
	uint64_t *coarse;
	struct kh_walk_stats *stats;
};

/* Take a reference, unless the count is already zero. */
bool kh_root_tryget(struct kh_root *root);
/* Drop a reference; the last one unlinks the root and retires its tables. */
void kh_root_put(struct kh_mmu *mmu, struct kh_root *root);

static inline uint64_t kh_read_entry(const uint64_t *entry)
{
	return __atomic_load_n(entry, __ATOMIC_ACQUIRE);
}

/* The table that an entry points to; NULL if it is outside the table memory. */
static inline uint64_t *kh_child(const struct kh_mmu *mmu, uint64_t raw, unsigned int level)
{
	uint64_t pa = kh_raw(&mmu->fmt, raw) & mmu->fmt.table_mask;

	return kh_memory_host(&mmu->memory, pa, kh_table_bytes(&mmu->fmt, level - 1));
}

/* Note an entry that a walk refuses. */
void kh_refuse(const struct kh_mmu *mmu, struct kh_descent *descent, uint64_t raw,
	       unsigned int level, uint64_t gfn, uint32_t reason);
/* kh_child() for a walk of tables that others own: refused entries give NULL and are noted. */
uint64_t *kh_descend(const struct kh_mmu *mmu, struct kh_descent *descent, uint64_t raw,
		     unsigned int level, uint64_t gfn);

/* One present leaf that a walk found. */
struct kh_leaf_ctx {
	struct kh_mmu *mmu;
	uint64_t *entry;
	uint64_t old;
	uint64_t gfn; /* first gfn that the leaf maps */
	unsigned int level;
	void *arg;
};

/* A negative value ends the walk; KH_LOOK_AGAIN: a table has replaced the leaf. */
#define KH_LOOK_AGAIN 1

typedef int (*kh_leaf_fn)(const struct kh_leaf_ctx *ctx);

/* Every present leaf that touches [start, end), in the shape of the format's walker. */
int kh_tdp_for_each_leaf(struct kh_mmu *mmu, struct kh_root *root, uint64_t start, uint64_t end,
			 kh_leaf_fn fn, void *arg);
int kh_stage2_for_each_leaf(struct kh_mmu *mmu, struct kh_root *root, uint64_t start,
			    uint64_t end, kh_leaf_fn fn, void *arg);
int kh_radix_for_each_leaf(struct kh_mmu *mmu, struct kh_root *root, uint64_t start,
			   uint64_t end, kh_leaf_fn fn, void *arg);
int kh_for_each_leaf(struct kh_mmu *mmu, struct kh_root *root, uint64_t start, uint64_t end,
		     kh_leaf_fn fn, void *arg);

/*
 * Map one leaf into an empty entry: -EEXIST if it is not empty, -EAGAIN if another
 * thread has locked it. tdp and stage 2 with the lock held for read, radix with it
 * held for write.
 */
int kh_tdp_map(struct kh_mmu *mmu, struct kh_root *root, const struct kh_map *map);
int kh_stage2_map(struct kh_mmu *mmu, struct kh_root *root, const struct kh_map *map);
int kh_radix_map(struct kh_mmu *mmu, struct kh_root *root, const struct kh_map *map);
/* stage 2 only: remove leaves, and tables that become empty. */
int kh_stage2_unmap(struct kh_mmu *mmu, struct kh_root *root, uint64_t start, uint64_t end,
		    bool *any);

/* A table page of a level for entries of level `level`. */
uint64_t *kh_table_alloc(struct kh_mmu *mmu, unsigned int level);
/* Free a table that was never linked. */
void kh_table_free(struct kh_mmu *mmu, uint64_t *table, unsigned int level);
/* Free a table that walks may still use, after they have left. */
void kh_table_retire(struct kh_mmu *mmu, uint64_t *table, unsigned int level);
/* Retire a table that was unlinked, with all tables below it; its leaves are unmapped. */
void kh_table_remove(struct kh_mmu *mmu, uint64_t *table, unsigned int level);
/* Remove a leaf; returns its old value. Accessed bits set in it are counted as dropped. */
uint64_t kh_leaf_remove(struct kh_mmu *mmu, uint64_t *entry, unsigned int level, uint64_t left);
/* A range of gfns of a table that this layer owns. */
bool kh_range_ok(const struct kh_mmu *mmu, uint32_t as_id, uint64_t start, uint64_t end);
/* The entry for a gfn at a level, present or not; NULL if there is no table at that level. */
uint64_t *kh_entry_find(struct kh_mmu *mmu, struct kh_root *root, uint64_t gfn,
			unsigned int level);
struct kh_root *kh_root_new(struct kh_mmu *mmu, uint32_t as_id);
/* The root that vCPUs use; inside an epoch, or with the MMU lock held. */
struct kh_root *kh_root_current(struct kh_mmu *mmu, uint32_t as_id);
const struct kh_slot *kh_slot_find(const struct kh_mmu *mmu, uint32_t as_id, uint64_t gfn);

/* A translation as hardware caches it. */
struct kh_translation {
	uint64_t gfn;
	uint64_t pfn;
	unsigned int level;
	bool write; /* a write needs no further walk */
};

#define KH_FAULT_ABSENT 1 /* no leaf */
#define KH_FAULT_ACCESS 2 /* accessed bit clear, and hardware does not set it */
#define KH_FAULT_WRITE 3  /* not writable, or dirty state that hardware does not set */

/* Translate like hardware, inside an epoch; *set counts accessed bits that it set. */
int kh_hw_walk(struct kh_mmu *mmu, uint32_t as_id, uint64_t gfn, bool write,
	       struct kh_translation *out, uint64_t *set);

/* Consecutive last-level entries of one table. */
void kh_harvest_run(struct kh_harvest *harvest, uint64_t *entries, uint64_t gfn, uint64_t n);
/* One leaf above the last level, found with value `raw`. */
void kh_harvest_huge(struct kh_harvest *harvest, uint64_t *entry, uint64_t raw, uint64_t gfn,
		     unsigned int level);
/* Clear one bit by compare-and-swap; true if this call changed it from 1 to 0. */
bool kh_clear_leaf(const struct kh_format *fmt, const struct kh_probe *probe, uint64_t *entry,
		   unsigned int level);
/* Leave the epoch and re-enter, if a thread waits for that. True: start over from the root. */
bool kh_harvest_yield(struct kh_harvest *harvest);

void kh_tdp_harvest(struct kh_harvest *harvest, struct kh_root *root);
void kh_stage2_harvest(struct kh_harvest *harvest, struct kh_root *root);
void kh_radix_harvest(struct kh_harvest *harvest, struct kh_root *root);

/*
 * Which of n entries match; bit i of out[i / 64] is entry i. Returns false if
 * none does (out is not written then). n is at most 512.
 */
bool kh_scan(const uint64_t *entries, unsigned int n, uint64_t quick, uint64_t mask,
	     uint64_t value, uint64_t *out);

#endif
