#include "store_internal.h"

#include <stdlib.h>
#include <string.h>

/* A page that compresses to more than this is kept as it is. */
#define WORTH_BYTES (KH_PAGE_BYTES - KH_PAGE_BYTES / 8)

void kh_store_init(struct kh_store *store)
{
	kh_slab_init(&store->slab);
}

int kh_store_grow(struct kh_store *store, uint64_t n_pages)
{
	uint64_t *content = calloc(n_pages, sizeof(*content));
	uint16_t *n_bytes = calloc(n_pages, sizeof(*n_bytes));

	if (!content || !n_bytes) {
		free(content);
		free(n_bytes);
		return -ENOMEM;
	}
	free(store->content);
	free(store->n_bytes);
	store->content = content;
	store->n_bytes = n_bytes;
	return 0;
}

static int is_same_filled(const uint64_t *words)
{
	for (int i = 1; i < KH_PAGE_BYTES / 8; i++)
		if (words[i] != words[0])
			return 0;
	return 1;
}

static int take_injected(uint64_t *failures)
{
	uint64_t left = __atomic_load_n(failures, __ATOMIC_RELAXED);

	while (left)
		if (__atomic_compare_exchange_n(failures, &left, left - 1, 0, __ATOMIC_RELAXED,
						__ATOMIC_RELAXED))
			return 1;
	return 0;
}

/* Add to the bytes used unless that passes the limit. */
static int reserve(struct kh_store *store, uint64_t n_bytes)
{
	uint64_t used = __atomic_add_fetch(&store->used_bytes, n_bytes, __ATOMIC_RELAXED);
	uint64_t limit = __atomic_load_n(&store->limit_bytes, __ATOMIC_RELAXED);

	if (!limit || used <= limit)
		return 1;
	__atomic_sub_fetch(&store->used_bytes, n_bytes, __ATOMIC_RELAXED);
	return 0;
}

static int put_bytes(struct kh_store *store, uint64_t index, const void *bytes, uint16_t n_bytes)
{
	void *copy;

	if (!reserve(store, n_bytes))
		return KH_EVICT_FULL;
	copy = kh_slab_take(&store->slab, n_bytes);
	if (!copy) {
		__atomic_sub_fetch(&store->used_bytes, n_bytes, __ATOMIC_RELAXED);
		return KH_EVICT_ERROR;
	}
	memcpy(copy, bytes, n_bytes);
	store->content[index] = (uintptr_t)copy;
	store->n_bytes[index] = n_bytes;
	if (n_bytes == KH_PAGE_BYTES)
		__atomic_fetch_add(&store->raw_pages, 1, __ATOMIC_RELAXED);
	return KH_EVICT_DONE;
}

int kh_store_put(struct kh_store *store, uint64_t index, const void *page)
{
	char packed[KH_PAGE_BYTES];
	int n_bytes;

	if (take_injected(&store->failing_stores))
		return KH_EVICT_ERROR;
	if (is_same_filled(page)) {
		memcpy(&store->content[index], page, sizeof(uint64_t));
		store->n_bytes[index] = KH_SAME_FILLED;
		__atomic_fetch_add(&store->same_filled_pages, 1, __ATOMIC_RELAXED);
		return KH_EVICT_DONE;
	}
	n_bytes = store->compress ? store->compress(page, packed, KH_PAGE_BYTES, WORTH_BYTES, 1) : 0;
	if (n_bytes > 0)
		return put_bytes(store, index, packed, n_bytes);
	if (store->refuse_raw)
		return KH_EVICT_REFUSED;
	return put_bytes(store, index, page, KH_PAGE_BYTES);
}

int kh_store_get(struct kh_store *store, uint64_t index, void *page)
{
	uint16_t n_bytes = store->n_bytes[index];
	const char *bytes = (const char *)(uintptr_t)store->content[index];

	if (!n_bytes)
		return -ENOENT;
	if (take_injected(&store->failing_loads))
		return -EBADMSG;
	if (n_bytes == KH_SAME_FILLED) {
		uint64_t *words = page;

		for (int i = 0; i < KH_PAGE_BYTES / 8; i++)
			words[i] = store->content[index];
		return 0;
	}
	if (n_bytes == KH_PAGE_BYTES) {
		memcpy(page, bytes, KH_PAGE_BYTES);
		return 0;
	}
	return store->decompress(bytes, page, n_bytes, KH_PAGE_BYTES) == KH_PAGE_BYTES ? 0 : -EBADMSG;
}

void kh_store_drop(struct kh_store *store, uint64_t index)
{
	uint16_t n_bytes = store->n_bytes[index];

	if (n_bytes == KH_SAME_FILLED) {
		__atomic_fetch_sub(&store->same_filled_pages, 1, __ATOMIC_RELAXED);
	} else if (n_bytes) {
		kh_slab_give(&store->slab, (void *)(uintptr_t)store->content[index]);
		__atomic_fetch_sub(&store->used_bytes, n_bytes, __ATOMIC_RELAXED);
		if (n_bytes == KH_PAGE_BYTES)
			__atomic_fetch_sub(&store->raw_pages, 1, __ATOMIC_RELAXED);
	}
	store->content[index] = 0;
	store->n_bytes[index] = 0;
}

void kh_store_destroy(struct kh_store *store, uint64_t n_pages)
{
	for (uint64_t index = 0; store->n_bytes && index < n_pages; index++)
		kh_store_drop(store, index);
	free(store->content);
	free(store->n_bytes);
	kh_slab_destroy(&store->slab);
}
