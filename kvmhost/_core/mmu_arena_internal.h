/*
 * Table pages: a memfd, mapped once, at a made-up physical address.
 *
 * Blocks are powers of two from 256 bytes (a radix table of 64 KiB base pages) to
 * 64 KiB (a radix root, 16 concatenated start tables), aligned to their size. A
 * block that was never used costs no memory.
 */
#ifndef KVMHOST_MMU_ARENA_INTERNAL_H
#define KVMHOST_MMU_ARENA_INTERNAL_H

#include "compat.h"

#include <pthread.h>
#include <stdbool.h>

#define KH_ARENA_MIN_ORDER 8
#define KH_ARENA_ORDERS 9

struct kh_arena_list {
	uint64_t *offsets;
	uint64_t n;
	uint64_t size;
};

struct kh_arena {
	int fd;
	uint8_t *base;
	uint64_t pa;
	uint64_t n_bytes;
	uint64_t top;  /* offset of the part that was never allocated */
	uint64_t live; /* bytes allocated and not freed */
	bool poison;
	pthread_mutex_t lock;
	struct kh_arena_list free[KH_ARENA_ORDERS];
};

int kh_arena_open(struct kh_arena **out, uint64_t pa, uint64_t n_bytes, bool poison);
void kh_arena_close(struct kh_arena *arena);
/* A zeroed block; NULL if the arena is full. */
void *kh_arena_alloc(struct kh_arena *arena, uint64_t n_bytes);
void kh_arena_free(struct kh_arena *arena, void *block, uint64_t n_bytes);

static inline uint64_t kh_arena_pa(const struct kh_arena *arena, const void *block)
{
	return arena->pa + (uint64_t)((const uint8_t *)block - arena->base);
}

#endif
