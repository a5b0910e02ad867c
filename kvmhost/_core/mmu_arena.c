#include "mmu_arena_internal.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "mmu_core.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define GUARD(block, n) __asan_poison_memory_region(block, n)
#define UNGUARD(block, n) __asan_unpoison_memory_region(block, n)
#else
#define GUARD(block, n) ((void)(block), (void)(n))
#define UNGUARD(block, n) ((void)(block), (void)(n))
#endif

static unsigned int order_of(uint64_t n_bytes)
{
	unsigned int order = 0;

	while ((1ull << (KH_ARENA_MIN_ORDER + order)) < n_bytes)
		order++;
	return order;
}

int kh_arena_open(struct kh_arena **out, uint64_t pa, uint64_t n_bytes, bool poison)
{
	struct kh_arena *arena = calloc(1, sizeof(*arena));
	int result;

	if (!arena)
		return -ENOMEM;
	arena->fd = memfd_create("kvmhost-mmu", MFD_CLOEXEC);
	if (arena->fd < 0 || ftruncate(arena->fd, (off_t)n_bytes) < 0)
		goto fail;
	arena->base = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
			   arena->fd, 0);
	if (arena->base == MAP_FAILED)
		goto fail;
	arena->pa = pa;
	arena->n_bytes = n_bytes;
	arena->poison = poison;
	pthread_mutex_init(&arena->lock, NULL);
	*out = arena;
	return 0;
fail:
	result = -errno;
	if (arena->fd >= 0)
		close(arena->fd);
	free(arena);
	return result;
}

void kh_arena_close(struct kh_arena *arena)
{
	UNGUARD(arena->base, arena->n_bytes);
	munmap(arena->base, arena->n_bytes);
	close(arena->fd);
	for (unsigned int i = 0; i < KH_ARENA_ORDERS; i++)
		free(arena->free[i].offsets);
	pthread_mutex_destroy(&arena->lock);
	free(arena);
}

static int push(struct kh_arena_list *list, uint64_t offset)
{
	if (list->n == list->size) {
		uint64_t size = list->size ? list->size * 2 : 64;
		uint64_t *grown = realloc(list->offsets, size * sizeof(*grown));

		if (!grown)
			return -ENOMEM;
		list->offsets = grown;
		list->size = size;
	}
	list->offsets[list->n++] = offset;
	return 0;
}

/* A block that was never used is already zero. Alignment gaps are added to the smaller lists. */
static void *fresh(struct kh_arena *arena, unsigned int order)
{
	uint64_t size = 1ull << (KH_ARENA_MIN_ORDER + order);
	uint64_t offset;

	while (arena->top & (size - 1)) {
		unsigned int gap = (unsigned int)__builtin_ctzll(arena->top) - KH_ARENA_MIN_ORDER;

		if (push(&arena->free[gap], arena->top) < 0)
			return NULL;
		arena->top += 1ull << (KH_ARENA_MIN_ORDER + gap);
	}
	offset = arena->top;
	if (size > arena->n_bytes - offset)
		return NULL;
	arena->top += size;
	return arena->base + offset;
}

void *kh_arena_alloc(struct kh_arena *arena, uint64_t n_bytes)
{
	unsigned int order = order_of(n_bytes);
	struct kh_arena_list *list = &arena->free[order];
	void *block = NULL;
	bool used = false;

	pthread_mutex_lock(&arena->lock);
	if (list->n) {
		block = arena->base + list->offsets[--list->n];
		used = true;
	} else {
		block = fresh(arena, order);
	}
	if (block)
		arena->live += 1ull << (KH_ARENA_MIN_ORDER + order);
	pthread_mutex_unlock(&arena->lock);
	if (block && used) {
		UNGUARD(block, n_bytes);
		memset(block, 0, n_bytes);
	}
	return block;
}

void kh_arena_free(struct kh_arena *arena, void *block, uint64_t n_bytes)
{
	unsigned int order = order_of(n_bytes);

	/* Atomic stores: a walk that wrongly reads this block must see whole words of poison. */
	for (uint64_t i = 0; arena->poison && i < n_bytes / 8; i++)
		__atomic_store_n((uint64_t *)block + i, KH_POISON, __ATOMIC_RELAXED);
	GUARD(block, n_bytes);
	pthread_mutex_lock(&arena->lock);
	arena->live -= 1ull << (KH_ARENA_MIN_ORDER + order);
	/* Out of memory for the list: the block is leaked, which only wastes arena space. */
	(void)push(&arena->free[order], (uint64_t)((uint8_t *)block - arena->base));
	pthread_mutex_unlock(&arena->lock);
}
