/* The secondary MMU's own structures; design and locking are in docs/mmu.md. */
#ifndef KVMHOST_MMU_INTERNAL_H
#define KVMHOST_MMU_INTERNAL_H

#include <pthread.h>

#include "mmu_core.h"
#include "mmu_epoch_internal.h"
#include "mmu_format_internal.h"

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

/* The MMU lock, with what waiting for it cost. */
struct kh_rwlock {
	pthread_rwlock_t lock;
	uint32_t waiters;
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
	uint32_t refcount; /* 0: being freed, walks pass it by */
	bool invalid;      /* being torn down: aged, never mapped into */
};

/*
 * Roots of one address space, inside an epoch: also a root that is being torn
 * down, as long as somebody holds it. One without references is passed by.
 */
#define kh_for_each_root_lockless(mmu, root, as)                                                 \
	for (root = __atomic_load_n(&(mmu)->roots, __ATOMIC_ACQUIRE); root;                      \
	     root = __atomic_load_n(&root->next, __ATOMIC_ACQUIRE))                              \
		if (root->as_id != (as) ||                                                       \
		    !__atomic_load_n(&root->refcount, __ATOMIC_ACQUIRE)) {                       \
		} else

struct kh_slot_array;
struct kh_arena;

struct kh_mmu {
	struct kh_format fmt;
	struct kh_memory memory;
	struct kh_arena *arena; /* NULL: tables of someone else */
	struct kh_root *roots;
	struct kh_epoch epoch;
	struct kh_rwlock lock;
	uint32_t flags;
	uint32_t n_as;
	struct kh_slot_array *slots; /* NULL: every gfn may be mapped */
};

/* One harvest over one range; walkers hand leaves to kh_harvest_*(). */
struct kh_harvest {
	struct kh_mmu *mmu;
	const struct kh_probe *probe;
	uint64_t start; /* gfns of this part */
	uint64_t end;
	uint64_t bit;   /* of `start` */
	struct kh_root *root;
	bool clear;
	bool may_yield;
	unsigned int epoch_slot;
	const uint64_t *mask;
	uint64_t *young;
	uint64_t *coarse;
	struct kh_walk_stats *stats;
};

/* Take a reference, unless the last one is gone already. */
bool kh_root_tryget(struct kh_root *root);
/* Drop a reference; the last one unlinks the root and retires its tables. */
void kh_root_put(struct kh_mmu *mmu, struct kh_root *root);

static inline uint64_t kh_read_entry(const uint64_t *entry)
{
	return __atomic_load_n(entry, __ATOMIC_ACQUIRE);
}

/* The table that an entry points to; NULL (and counted) if it lies nowhere. */
static inline uint64_t *kh_child(const struct kh_mmu *mmu, uint64_t raw, unsigned int level,
				 uint64_t *bad_pointers)
{
	uint64_t pa = kh_raw(&mmu->fmt, raw) & mmu->fmt.table_mask;
	void *table = kh_memory_host(&mmu->memory, pa, kh_table_bytes(&mmu->fmt, level - 1));

	if (!table)
		++*bad_pointers;
	return table;
}

/* Consecutive last-level entries of one table. */
void kh_harvest_run(struct kh_harvest *harvest, uint64_t *entries, uint64_t gfn, uint64_t n);
/* One leaf above the last level, found with value `raw`. */
void kh_harvest_huge(struct kh_harvest *harvest, uint64_t *entry, uint64_t raw, uint64_t gfn,
		     unsigned int level);
/* Leave the epoch and come back, if someone waits for that. True: start over from the root. */
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
