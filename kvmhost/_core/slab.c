#include "slab_internal.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK_BYTES 32768ull
#define CHUNK_STEPS (CHUNK_BYTES / KH_SLAB_STEP)
#define BLOCK_BYTES (4ull << 20)
#define BLOCK_CHUNKS (BLOCK_BYTES / CHUNK_BYTES)
/* The first page of a file identifies it; see kvmhost/pager/storefile.py. */
#define FILE_HEADER_BYTES 4096ull
#define NO_CHUNK UINT32_MAX

/* A slot's number is where it starts, in steps over all chunks. */
struct kh_slab_chunk {
	uint32_t next, previous;	/* in partial[class]; next also among the empty ones */
	uint16_t class;
	uint16_t used;
	uint16_t n_slots;
	uint64_t free[CHUNK_STEPS / 64];
};

int kh_slab_init(struct kh_slab *slab, uint64_t n_pages, int fd)
{
	/* At worst every page keeps a chunk of its own in use. */
	uint64_t max_blocks = (n_pages + KH_SLAB_CLASSES) / BLOCK_CHUNKS + 1;

	*slab = (struct kh_slab){ .fd = fd, .empty = NO_CHUNK, .max_blocks = max_blocks };
	for (int class = 0; class < KH_SLAB_CLASSES; class++)
		slab->partial[class] = NO_CHUNK;
	pthread_mutex_init(&slab->lock, NULL);
	/* Of fixed size: slots are read while others are taken. */
	slab->blocks = calloc(max_blocks, sizeof(*slab->blocks));
	return slab->blocks ? 0 : -ENOMEM;
}

static void link_chunk(struct kh_slab *slab, uint32_t number)
{
	struct kh_slab_chunk *chunk = &slab->chunks[number];

	chunk->previous = NO_CHUNK;
	chunk->next = slab->partial[chunk->class];
	if (chunk->next != NO_CHUNK)
		slab->chunks[chunk->next].previous = number;
	slab->partial[chunk->class] = number;
}

static void unlink_chunk(struct kh_slab *slab, uint32_t number)
{
	struct kh_slab_chunk *chunk = &slab->chunks[number];

	if (chunk->previous != NO_CHUNK)
		slab->chunks[chunk->previous].next = chunk->next;
	else
		slab->partial[chunk->class] = chunk->next;
	if (chunk->next != NO_CHUNK)
		slab->chunks[chunk->next].previous = chunk->previous;
}

/* Memory behind a chunk: address space is mapped a block at a time. */
static int map_block(struct kh_slab *slab, uint32_t number)
{
	uint64_t block = number / BLOCK_CHUNKS;
	void *mapping;

	if (slab->fd >= 0 || slab->blocks[block])
		return 0;
	mapping = mmap(NULL, BLOCK_BYTES, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (mapping == MAP_FAILED)
		return -ENOMEM;
	slab->blocks[block] = mapping;
	return 0;
}

/* An unused chunk: a returned one, or a new one. */
static uint32_t find_chunk(struct kh_slab *slab)
{
	uint32_t number = slab->empty;

	if (number != NO_CHUNK) {
		slab->empty = slab->chunks[number].next;
		return number;
	}
	if (slab->n_chunks == slab->max_blocks * BLOCK_CHUNKS || map_block(slab, slab->n_chunks))
		return NO_CHUNK;
	if (slab->n_chunks == slab->chunk_room) {
		uint32_t room = slab->chunk_room + slab->chunk_room / 4 + BLOCK_CHUNKS;
		void *grown = realloc(slab->chunks, room * sizeof(*slab->chunks));

		if (!grown)
			return NO_CHUNK;
		slab->chunks = grown;
		slab->chunk_room = room;
	}
	return slab->n_chunks++;
}

static void add(uint64_t *total, int64_t n_bytes)
{
	__atomic_fetch_add(total, n_bytes, __ATOMIC_RELAXED);
}

static int is_at_limit(const struct kh_slab *slab)
{
	uint64_t limit = __atomic_load_n(&slab->limit_bytes, __ATOMIC_RELAXED);

	return limit && slab->chunk_bytes + CHUNK_BYTES > limit;
}

static uint32_t new_chunk(struct kh_slab *slab, uint32_t class)
{
	uint32_t number = is_at_limit(slab) ? NO_CHUNK : find_chunk(slab);
	struct kh_slab_chunk *chunk;

	if (number == NO_CHUNK)
		return NO_CHUNK;
	chunk = &slab->chunks[number];
	*chunk = (struct kh_slab_chunk){ .class = class, .n_slots = CHUNK_STEPS / (class + 1) };
	for (int i = 0; i < chunk->n_slots; i++)
		chunk->free[i / 64] |= 1ull << (i % 64);
	if (slab->fd < 0 &&
	    /* All of it at once: a fault for each of its pages costs more than to pack one. */
	    madvise(kh_slab_address(slab, number * CHUNK_STEPS), CHUNK_BYTES,
		    MADV_POPULATE_WRITE) && errno == ENOMEM) {
		/* Without this, a touch would invoke the OOM killer. */
		slab->chunks[number].next = slab->empty;
		slab->empty = number;
		return NO_CHUNK;
	}
	add(&slab->chunk_bytes, CHUNK_BYTES);
	link_chunk(slab, number);
	return number;
}

static void return_chunk(struct kh_slab *slab, uint32_t number)
{
	uint64_t first = number * CHUNK_STEPS;

	add(&slab->chunk_bytes, -(int64_t)CHUNK_BYTES);
	if (slab->fd < 0)
		madvise(kh_slab_address(slab, first), CHUNK_BYTES, MADV_DONTNEED);
	else
		/* A file system without holes keeps the blocks for the next chunk. */
		(void)!fallocate(slab->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				 kh_slab_offset(first), CHUNK_BYTES);
	slab->chunks[number].next = slab->empty;
	slab->empty = number;
}

static int take_slot(struct kh_slab_chunk *chunk)
{
	int word = 0, bit;

	while (!chunk->free[word])
		word++;
	bit = __builtin_ctzll(chunk->free[word]);
	chunk->free[word] &= ~(1ull << bit);
	chunk->used++;
	return word * 64 + bit;
}

/* Take a slot of a chunk that has one free. */
static int64_t take_from(struct kh_slab *slab, uint32_t number)
{
	struct kh_slab_chunk *chunk = &slab->chunks[number];
	int64_t slot = number * CHUNK_STEPS + take_slot(chunk) * (chunk->class + 1ull);

	add(&slab->slot_bytes, (chunk->class + 1ull) * KH_SLAB_STEP);
	if (slab->slot_bytes > slab->pass_mark)
		slab->pass_mark = slab->slot_bytes;
	if (chunk->used == chunk->n_slots)
		unlink_chunk(slab, number);
	return slot;
}

int64_t kh_slab_take(struct kh_slab *slab, uint64_t n_bytes)
{
	uint32_t class = (n_bytes - 1) / KH_SLAB_STEP, number;
	int64_t slot;

	pthread_mutex_lock(&slab->lock);
	slot = is_at_limit(slab) ? -ENOSPC : -ENOMEM;
	number = slab->partial[class];
	if (number == NO_CHUNK)
		number = new_chunk(slab, class);
	/* Use a slot that is too large if there is no other. */
	while (number == NO_CHUNK && ++class < KH_SLAB_CLASSES)
		number = slab->partial[class];
	if (number != NO_CHUNK)
		slot = take_from(slab, number);
	pthread_mutex_unlock(&slab->lock);
	return slot;
}

void kh_slab_give(struct kh_slab *slab, uint64_t slot)
{
	uint32_t number = slot / CHUNK_STEPS;
	struct kh_slab_chunk *chunk;
	uint64_t i;

	pthread_mutex_lock(&slab->lock);
	chunk = &slab->chunks[number];
	i = slot % CHUNK_STEPS / (chunk->class + 1u);
	chunk->free[i / 64] |= 1ull << (i % 64);
	add(&slab->slot_bytes, -(int64_t)((chunk->class + 1ull) * KH_SLAB_STEP));
	if (chunk->used-- == chunk->n_slots)
		link_chunk(slab, number);
	if (!chunk->used) {
		unlink_chunk(slab, number);
		return_chunk(slab, number);
	}
	pthread_mutex_unlock(&slab->lock);
}

char *kh_slab_address(const struct kh_slab *slab, uint64_t slot)
{
	uint64_t offset = slot * KH_SLAB_STEP;

	return slab->blocks[offset / BLOCK_BYTES] + offset % BLOCK_BYTES;
}

uint64_t kh_slab_offset(uint64_t slot)
{
	return FILE_HEADER_BYTES + slot * KH_SLAB_STEP;
}

/* Free space that does not justify a pass: a few chunks of each size. */
#define SPARE_BYTES (16 * CHUNK_BYTES)

int kh_slab_is_sparse(struct kh_slab *slab)
{
	int sparse;

	pthread_mutex_lock(&slab->lock);
	/*
	 * A quarter must have been freed since the last pass, to avoid repeated passes without
	 * effect.
	 */
	sparse = slab->pass_chunk ||
		 (slab->chunk_bytes > 2 * slab->slot_bytes +
			      (is_at_limit(slab) ? 0 : SPARE_BYTES) &&
		  slab->slot_bytes <= slab->pass_mark / 4 * 3);
	if (sparse && !slab->pass_chunk) {
		memset(slab->pass_target, 0, sizeof(slab->pass_target));
		slab->pass_chunk = slab->n_chunks;
		slab->pass_slot = 0;
	}
	pthread_mutex_unlock(&slab->lock);
	return sparse;
}

/* Next slot in use of a chunk, or -1. */
static int64_t next_used(struct kh_slab *slab, uint32_t number)
{
	const struct kh_slab_chunk *chunk = &slab->chunks[number];

	if (!chunk->used || chunk->used * 2 > chunk->n_slots)
		return -1;
	for (uint32_t i = slab->pass_slot; i < chunk->n_slots; i++)
		if (!(chunk->free[i / 64] >> (i % 64) & 1)) {
			slab->pass_slot = i + 1;
			return number * CHUNK_STEPS + i * (chunk->class + 1ull);
		}
	return -1;
}

int64_t kh_slab_next_move(struct kh_slab *slab)
{
	int64_t slot = -1;

	pthread_mutex_lock(&slab->lock);
	while (slab->pass_chunk) {
		slot = next_used(slab, slab->pass_chunk - 1);
		if (slot >= 0)
			break;
		slab->pass_chunk--;
		slab->pass_slot = 0;
	}
	if (slot < 0)
		slab->pass_mark = slab->slot_bytes;
	pthread_mutex_unlock(&slab->lock);
	return slot;
}

int64_t kh_slab_take_before(struct kh_slab *slab, uint64_t slot)
{
	uint32_t number = slot / CHUNK_STEPS, class;
	int64_t taken = -ENOENT;

	pthread_mutex_lock(&slab->lock);
	class = slab->chunks[number].class;
	for (uint32_t i = slab->pass_target[class]; taken < 0 && i < number; i++) {
		const struct kh_slab_chunk *chunk = &slab->chunks[i];

		slab->pass_target[class] = i;
		if (chunk->used && chunk->used < chunk->n_slots && chunk->class == class)
			taken = take_from(slab, i);
	}
	pthread_mutex_unlock(&slab->lock);
	return taken;
}

void kh_slab_destroy(struct kh_slab *slab)
{
	for (uint64_t i = 0; slab->blocks && i < slab->max_blocks; i++)
		if (slab->blocks[i])
			munmap(slab->blocks[i], BLOCK_BYTES);
	free(slab->blocks);
	free(slab->chunks);
	pthread_mutex_destroy(&slab->lock);
}
