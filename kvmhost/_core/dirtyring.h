/*
 * KVM's dirty rings: one per vCPU, collected into one bitmap per memslot. The size
 * of the rings does not limit the number of dirty pages: a vCPU whose ring is full
 * collects all rings into the bitmaps and continues.
 */
#ifndef KVMHOST_DIRTYRING_H
#define KVMHOST_DIRTYRING_H

#include "compat.h"

#define KH_RING_SLOTS 8
#define KH_RING_VCPUS 64

struct kh_rings;

/* Counters of the rings. */
struct kh_ring_counts {
	uint64_t entries;	/* taken out of rings */
	uint64_t full;		/* exits because a ring was full */
	uint64_t resets;	/* KVM_RESET_DIRTY_RINGS calls */
	uint64_t foreign;	/* entries of unknown slots, or beyond the end of a slot */
};

/* n_entries as given to KVM_CAP_DIRTY_LOG_RING, a power of two. NULL: no memory. */
struct kh_rings *kh_rings_new(int vm_fd, uint32_t n_entries);
/* Slots are numbered from 0 in the order in which they are added. */
int kh_rings_add_slot(struct kh_rings *rings, uint64_t n_pages);
/* Map a vCPU's ring; the mapping lives until kh_rings_free. */
int kh_rings_add_vcpu(struct kh_rings *rings, int vcpu_fd);
/*
 * Collect all entries of all rings and let KVM write-protect those pages again.
 * Returns the number of entries or -errno. Any thread, vCPUs may run.
 */
int64_t kh_rings_collect(struct kh_rings *rings);
/* The same, by a vCPU that found its ring full. */
int64_t kh_rings_on_full(struct kh_rings *rings);
/*
 * Collect, then set the bit i of words for each page first + i that is dirty. With
 * clear those of mask (NULL: all) become clean. words must be zero at entry.
 */
int kh_rings_harvest(struct kh_rings *rings, uint32_t slot, uint64_t first, uint64_t n_pages,
		     int clear, const uint64_t *mask, uint64_t *words);
/* Collect, and clear all bitmaps. */
int kh_rings_forget(struct kh_rings *rings);
void kh_rings_counts(struct kh_rings *rings, struct kh_ring_counts *counts);
void kh_rings_free(struct kh_rings *rings);

#endif
