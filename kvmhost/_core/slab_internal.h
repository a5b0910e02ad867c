/*
 * Memory for compressed pages: slots of a few sizes, cut from aligned chunks.
 *
 * Pages come and go for as long as a VM lives, in all sizes and no order; a
 * general allocator fragments under that by half. Here a chunk holds slots of
 * one size, a freed slot is used again by the next page of that size, and the
 * memory of a chunk without used slots goes back to the system.
 */
#ifndef KVMHOST_SLAB_INTERNAL_H
#define KVMHOST_SLAB_INTERNAL_H

#include "compat.h"
#include <pthread.h>

#define KH_SLAB_STEP 64
#define KH_SLAB_CLASSES 64	/* up to 4096 bytes */

struct kh_slab_chunk;
struct kh_slab_block;

struct kh_slab {
	pthread_mutex_t lock;
	struct kh_slab_chunk *partial[KH_SLAB_CLASSES];	/* chunks with a free slot */
	struct kh_slab_block *blocks;	/* address space that chunks are cut from */
	struct kh_slab_chunk *empty;	/* chunks of no size, without memory behind */
	uint64_t chunk_bytes;		/* memory behind the chunks in use */
};

void kh_slab_init(struct kh_slab *slab);
/* 1 to 4096 bytes, aligned to 64; NULL if memory is out. */
void *kh_slab_take(struct kh_slab *slab, uint64_t n_bytes);
void kh_slab_give(struct kh_slab *slab, void *slot);
void kh_slab_destroy(struct kh_slab *slab);

#endif
