/*
 * The compressed store: the contents of evicted pages, by page index. The
 * caller holds the page's lock; the totals lock themselves.
 */
#ifndef KVMHOST_STORE_INTERNAL_H
#define KVMHOST_STORE_INTERNAL_H

#include "pager.h"
#include "slab_internal.h"

struct kh_store {
	uint64_t *content;	/* fill word, or address of the bytes */
	uint16_t *n_bytes;	/* 0: nothing; KH_SAME_FILLED; else bytes at content */
	uint64_t limit_bytes;
	uint64_t used_bytes;
	uint64_t same_filled_pages;
	uint64_t raw_pages;
	uint64_t failing_stores;
	uint64_t failing_loads;
	int refuse_raw;
	struct kh_slab slab;
	kh_compress_fn compress;
	kh_decompress_fn decompress;
};

#define KH_SAME_FILLED 0xffff
#define KH_PAGE_BYTES 4096

void kh_store_init(struct kh_store *store);
int kh_store_grow(struct kh_store *store, uint64_t n_pages);
/* Keep a page: KH_EVICT_DONE, _FULL, _REFUSED or _ERROR; unless done, nothing changed. */
int kh_store_put(struct kh_store *store, uint64_t index, const void *page);
/* Copy a page out; it stays until kh_store_drop. 0, -ENOENT or -EBADMSG. */
int kh_store_get(struct kh_store *store, uint64_t index, void *page);
void kh_store_drop(struct kh_store *store, uint64_t index);
void kh_store_destroy(struct kh_store *store, uint64_t n_pages);

#endif
