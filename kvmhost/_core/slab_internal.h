/*
 * Room for compressed pages: slots of a few sizes, cut from chunks, in memory
 * or in a file.
 *
 * Pages are stored and freed throughout the life of a VM, in all sizes and in no
 * order; a general allocator loses half of its memory to fragmentation under this
 * load. Here a chunk holds slots of one size, a freed slot is used again by the
 * next page of that size, and a chunk without used slots is returned to the system.
 * A pass empties sparse chunks into others of their size. The metadata of a chunk
 * is kept in memory, so that an allocation reads nothing from the file.
 */
#ifndef KVMHOST_SLAB_INTERNAL_H
#define KVMHOST_SLAB_INTERNAL_H

#include "compat.h"
#include <pthread.h>

#define KH_SLAB_STEP 64
#define KH_SLAB_MAX_BYTES 4160	/* a page and its header */
#define KH_SLAB_CLASSES (KH_SLAB_MAX_BYTES / KH_SLAB_STEP)

struct kh_slab_chunk;

struct kh_slab {
	pthread_mutex_t lock;
	int fd;				/* the file, or -1: memory */
	struct kh_slab_chunk *chunks;
	uint32_t n_chunks;
	uint32_t chunk_room;
	uint32_t partial[KH_SLAB_CLASSES];	/* chunks with a free slot */
	uint32_t empty;			/* unassigned chunks, without backing memory */
	char **blocks;			/* memory that chunks are cut from */
	uint64_t max_blocks;
	uint64_t chunk_bytes;		/* behind the chunks in use */
	uint64_t slot_bytes;		/* of these, in slots in use */
	uint64_t limit_bytes;		/* on chunk_bytes; 0: none */
	/* The pass that empties sparse chunks, from the last chunk down. */
	uint32_t pass_chunk;		/* the one it is at, plus 1; 0: no pass */
	uint32_t pass_slot;
	uint32_t pass_target[KH_SLAB_CLASSES];	/* chunks below have no room */
	uint64_t pass_mark;		/* most slot_bytes since the last pass */
};

/* Room for n_pages pages, whatever they compress to. */
int kh_slab_init(struct kh_slab *slab, uint64_t n_pages, int fd);
/* A slot for 1 to KH_SLAB_MAX_BYTES bytes: its number; -ENOMEM, or -ENOSPC at the limit. */
int64_t kh_slab_take(struct kh_slab *slab, uint64_t n_bytes);
void kh_slab_give(struct kh_slab *slab, uint64_t slot);
/* Where a slot is: its address in memory, its offset in the file. */
char *kh_slab_address(const struct kh_slab *slab, uint64_t slot);
uint64_t kh_slab_offset(uint64_t slot);
/* Whether the slab is sparse enough for a pass, or a pass is in progress. */
int kh_slab_is_sparse(struct kh_slab *slab);
/* Next slot that a pass is to move, from a chunk at least half of which is free; -1: done. */
int64_t kh_slab_next_move(struct kh_slab *slab);
/* A slot of the same size in an earlier chunk; -ENOENT if there is none. */
int64_t kh_slab_take_before(struct kh_slab *slab, uint64_t slot);
void kh_slab_destroy(struct kh_slab *slab);

#endif
