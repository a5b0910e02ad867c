#include "slab_internal.h"

#include <stdlib.h>

/* A slot finds its chunk by its address: chunks are aligned to their size. */
#define CHUNK_BYTES 32768ull

struct kh_slab_chunk {
	struct kh_slab_chunk *next, *previous;	/* in partial[class], if a slot is free */
	void *free;				/* slots given back, each pointing to the next */
	uint32_t class;
	uint32_t used;
	uint32_t fresh;				/* slots never taken yet, at the end */
	uint32_t n_slots;
};

#define HEADER_BYTES 64ull
#define BLOCK_BYTES (4ull << 20)
#define KH_SLAB_PAGE 4096ull

struct kh_slab_block {
	struct kh_slab_block *next;
	void *mapping;
	uintptr_t next_chunk;	/* address of the first chunk never used */
};

_Static_assert(sizeof(struct kh_slab_chunk) <= HEADER_BYTES, "the first slot follows the header");

void kh_slab_init(struct kh_slab *slab)
{
	*slab = (struct kh_slab){ 0 };
	pthread_mutex_init(&slab->lock, NULL);
}

static uint64_t slot_bytes(uint32_t class)
{
	return (class + 1ull) * KH_SLAB_STEP;
}

static void link_chunk(struct kh_slab *slab, struct kh_slab_chunk *chunk)
{
	chunk->previous = NULL;
	chunk->next = slab->partial[chunk->class];
	if (chunk->next)
		chunk->next->previous = chunk;
	slab->partial[chunk->class] = chunk;
}

static void unlink_chunk(struct kh_slab *slab, struct kh_slab_chunk *chunk)
{
	if (chunk->previous)
		chunk->previous->next = chunk->next;
	else
		slab->partial[chunk->class] = chunk->next;
	if (chunk->next)
		chunk->next->previous = chunk->previous;
}

/* Map address space for more chunks, and put them on the list of empty ones. */
static int map_block(struct kh_slab *slab)
{
	struct kh_slab_block *block = malloc(sizeof(*block));
	uintptr_t first;

	if (!block)
		return -ENOMEM;
	block->mapping = mmap(NULL, BLOCK_BYTES, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (block->mapping == MAP_FAILED) {
		free(block);
		return -ENOMEM;
	}
	block->next = slab->blocks;
	slab->blocks = block;
	/* The first chunk starts at the next multiple; what is before it stays unused. */
	first = ((uintptr_t)block->mapping + CHUNK_BYTES - 1) & ~(CHUNK_BYTES - 1);
	block->next_chunk = first;
	return 0;
}

/* Address of a chunk that nobody uses: a returned one, or the next of a block. */
static struct kh_slab_chunk *find_chunk(struct kh_slab *slab)
{
	struct kh_slab_chunk *chunk = slab->empty;
	struct kh_slab_block *block = slab->blocks;

	if (chunk) {
		slab->empty = chunk->next;
		return chunk;
	}
	if (!block || block->next_chunk + CHUNK_BYTES > (uintptr_t)block->mapping + BLOCK_BYTES) {
		if (map_block(slab))
			return NULL;
		block = slab->blocks;
	}
	chunk = (struct kh_slab_chunk *)block->next_chunk;
	block->next_chunk += CHUNK_BYTES;
	return chunk;
}

static struct kh_slab_chunk *new_chunk(struct kh_slab *slab, uint32_t class)
{
	struct kh_slab_chunk *chunk = find_chunk(slab);

	if (!chunk)
		return NULL;
	*chunk = (struct kh_slab_chunk){
		.class = class,
		.n_slots = (CHUNK_BYTES - HEADER_BYTES) / slot_bytes(class),
	};
	chunk->fresh = chunk->n_slots;
	slab->chunk_bytes += CHUNK_BYTES;
	link_chunk(slab, chunk);
	return chunk;
}

/* Only the first page keeps memory, for the link in the list of empty chunks. */
static void return_chunk(struct kh_slab *slab, struct kh_slab_chunk *chunk)
{
	slab->chunk_bytes -= CHUNK_BYTES;
	madvise((char *)chunk + KH_SLAB_PAGE, CHUNK_BYTES - KH_SLAB_PAGE, MADV_DONTNEED);
	chunk->next = slab->empty;
	slab->empty = chunk;
}

void *kh_slab_take(struct kh_slab *slab, uint64_t n_bytes)
{
	uint32_t class = (n_bytes - 1) / KH_SLAB_STEP;
	struct kh_slab_chunk *chunk;
	void *slot = NULL;

	pthread_mutex_lock(&slab->lock);
	chunk = slab->partial[class];
	if (!chunk)
		chunk = new_chunk(slab, class);
	if (chunk) {
		if (chunk->free) {
			slot = chunk->free;
			chunk->free = *(void **)slot;
		} else {
			uint64_t at = HEADER_BYTES +
				      (chunk->n_slots - chunk->fresh) * slot_bytes(class);

			slot = (char *)chunk + at;
			chunk->fresh--;
		}
		if (++chunk->used == chunk->n_slots)
			unlink_chunk(slab, chunk);
	}
	pthread_mutex_unlock(&slab->lock);
	return slot;
}

void kh_slab_give(struct kh_slab *slab, void *slot)
{
	struct kh_slab_chunk *chunk = (void *)((uintptr_t)slot & ~(CHUNK_BYTES - 1));

	pthread_mutex_lock(&slab->lock);
	if (chunk->used-- == chunk->n_slots)
		link_chunk(slab, chunk);
	*(void **)slot = chunk->free;
	chunk->free = slot;
	if (!chunk->used) {
		unlink_chunk(slab, chunk);
		return_chunk(slab, chunk);
	}
	pthread_mutex_unlock(&slab->lock);
}

void kh_slab_destroy(struct kh_slab *slab)
{
	while (slab->blocks) {
		struct kh_slab_block *block = slab->blocks;

		slab->blocks = block->next;
		munmap(block->mapping, BLOCK_BYTES);
		free(block);
	}
	pthread_mutex_destroy(&slab->lock);
}
