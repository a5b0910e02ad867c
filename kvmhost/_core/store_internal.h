/*
 * The compressed store: the contents of evicted pages, by page index, in memory
 * or in a file. The caller holds the page's lock; the totals lock themselves.
 *
 * Each record starts with a checksum that also covers the page index and the
 * eviction that wrote it, under a random key of this store: a read returns the
 * stored contents or an error, even if the file was modified.
 */
#ifndef KVMHOST_STORE_INTERNAL_H
#define KVMHOST_STORE_INTERNAL_H

#include "codec_internal.h"
#include "pager.h"
#include "slab_internal.h"

struct kh_store {
	uint64_t *entry;	/* fill word, or slot, bytes and batch; 0: nothing */
	uint64_t *same;		/* bitmap: entry is the fill word */
	uint64_t used_bytes;
	uint64_t same_filled_pages;
	uint64_t raw_pages;
	uint64_t failing_stores;
	uint64_t failing_loads;
	uint64_t disk_full;	/* writes that failed because the file was full */
	int refuse_raw;
	struct kh_slab slab;
	struct kh_coder coder;
};

#define KH_PAGE_BYTES 4096
#define KH_BATCHES 2048		/* evictions made together have the same number, modulo this */

/* store_fd: the file, or -1 for memory. 0 or an error; destroy is right after both. */
int kh_store_init(struct kh_store *store, uint64_t n_pages, const struct kh_codec *codec,
		  int store_fd);
/* Keep a page: KH_EVICT_DONE, _FULL, _REFUSED or _ERROR; unless done, nothing changed. */
int kh_store_put(struct kh_store *store, uint64_t index, const void *page, uint32_t batch);
/*
 * Copy a page out; it stays until kh_store_drop. 0, -ENOENT, -EIO if it cannot
 * be read, or -EBADMSG if it is not what was written.
 */
int kh_store_get(struct kh_store *store, uint64_t index, void *page);
void kh_store_drop(struct kh_store *store, uint64_t index);
/*
 * The index of the page in a slot, as far as it can be read: to be checked under that
 * page's lock.
 */
int64_t kh_store_owner(const struct kh_store *store, uint64_t slot);
/*
 * Move a page from a slot, if it is there, to an earlier chunk; returns whether it
 * was moved. The caller holds the page's lock.
 */
int kh_store_move(struct kh_store *store, uint64_t index, uint64_t slot);
/* Bytes of a page's content: 8 if same-filled, 0 if it is not there. */
uint64_t kh_store_bytes(const struct kh_store *store, uint64_t index);
/* Batch of a page, or -1 if that is not known: same-filled pages do not store it. */
int kh_store_batch(const struct kh_store *store, uint64_t index);
/* Consume one injected failure; returns whether there was one. */
int kh_take_injected(uint64_t *failures);
void kh_store_destroy(struct kh_store *store);

#endif
