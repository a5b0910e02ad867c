#include "store_internal.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A page that compresses to more than this is kept as it is. */
#define WORTH_BYTES (KH_PAGE_BYTES - KH_PAGE_BYTES / 8)

/* An entry: the slot, the content's bytes, the batch. */
#define SLOT_BITS 40
#define BYTES_BITS 13
#define BATCH_SHIFT (SLOT_BITS + BYTES_BITS)

/* A page in its slot. */
struct record {
	uint64_t checksum;
	uint64_t index;		/* the page index, for compaction */
	char content[KH_PAGE_BYTES];
};

#define RECORD_HEAD offsetof(struct record, content)

_Static_assert(sizeof(struct record) <= KH_SLAB_MAX_BYTES, "a page as it is fits a slot");
_Static_assert(KH_BATCHES <= 1 << (64 - BATCH_SHIFT), "a batch fits an entry");

static uint64_t make_entry(uint64_t slot, uint64_t n_bytes, uint64_t batch)
{
	return slot | n_bytes << SLOT_BITS | batch << BATCH_SHIFT;
}

static uint64_t slot_of(uint64_t entry)
{
	return entry & ((1ull << SLOT_BITS) - 1);
}

static uint64_t bytes_of(uint64_t entry)
{
	return entry >> SLOT_BITS & ((1ull << BYTES_BITS) - 1);
}

static uint64_t batch_of(uint64_t entry)
{
	return entry >> BATCH_SHIFT;
}

static int is_same(const struct kh_store *store, uint64_t index)
{
	return __atomic_load_n(&store->same[index / 64], __ATOMIC_RELAXED) >> (index % 64) & 1;
}

int kh_store_init(struct kh_store *store, uint64_t n_pages, const struct kh_codec *codec,
		  int store_fd)
{
	int slab = kh_slab_init(&store->slab, n_pages, store_fd);
	int coder = kh_coder_init(&store->coder, codec);

	store->entry = calloc(n_pages + 1, sizeof(*store->entry));
	store->same = calloc(n_pages / 64 + 1, sizeof(*store->same));
	if (slab || !store->entry || !store->same)
		return -ENOMEM;
	return coder;
}

void kh_store_destroy(struct kh_store *store)
{
	free(store->entry);
	free(store->same);
	kh_coder_destroy(&store->coder);
	kh_slab_destroy(&store->slab);
}

static int is_same_filled(const uint64_t *words)
{
	for (int i = 1; i < KH_PAGE_BYTES / 8; i++)
		if (words[i] != words[0])
			return 0;
	return 1;
}

int kh_take_injected(uint64_t *failures)
{
	uint64_t left = __atomic_load_n(failures, __ATOMIC_RELAXED);

	while (left)
		if (__atomic_compare_exchange_n(failures, &left, left - 1, 0, __ATOMIC_RELAXED,
						__ATOMIC_RELAXED))
			return 1;
	return 0;
}

/* A short write also means that the file is full. */
static int write_record(struct kh_store *store, uint64_t slot, const struct record *record,
			uint64_t n_bytes)
{
	ssize_t written;

	if (store->slab.fd < 0) {
		memcpy(kh_slab_address(&store->slab, slot), record, n_bytes);
		return KH_EVICT_DONE;
	}
	do
		written = pwrite(store->slab.fd, record, n_bytes, kh_slab_offset(slot));
	while (written < 0 && errno == EINTR);
	if (written == (ssize_t)n_bytes)
		return KH_EVICT_DONE;
	if (written < 0 && errno != ENOSPC && errno != EDQUOT && errno != EFBIG)
		return KH_EVICT_ERROR;
	__atomic_fetch_add(&store->disk_full, 1, __ATOMIC_RELAXED);
	return KH_EVICT_FULL;
}

static int put_record(struct kh_store *store, uint64_t index, struct record *record,
		      uint64_t content_bytes, uint32_t batch)
{
	uint64_t n_bytes = RECORD_HEAD + content_bytes;
	int64_t slot;
	int outcome;

	record->checksum = kh_coder_checksum(&store->coder, record->content, content_bytes, index,
					     batch % KH_BATCHES);
	record->index = index;
	slot = kh_slab_take(&store->slab, n_bytes);
	/* At the limit, and if the host has no memory for the store. */
	if (slot < 0)
		return KH_EVICT_FULL;
	outcome = write_record(store, slot, record, n_bytes);
	if (outcome != KH_EVICT_DONE) {
		kh_slab_give(&store->slab, slot);
		return outcome;
	}
	__atomic_add_fetch(&store->used_bytes, content_bytes, __ATOMIC_RELAXED);
	store->entry[index] = make_entry(slot, content_bytes, batch % KH_BATCHES);
	if (content_bytes == KH_PAGE_BYTES)
		__atomic_fetch_add(&store->raw_pages, 1, __ATOMIC_RELAXED);
	return KH_EVICT_DONE;
}

int kh_store_put(struct kh_store *store, uint64_t index, const void *page, uint32_t batch)
{
	struct record record;
	int n_bytes;

	if (kh_take_injected(&store->failing_stores))
		return KH_EVICT_ERROR;
	if (is_same_filled(page)) {
		memcpy(&store->entry[index], page, sizeof(uint64_t));
		__atomic_fetch_or(&store->same[index / 64], 1ull << (index % 64), __ATOMIC_RELAXED);
		__atomic_fetch_add(&store->same_filled_pages, 1, __ATOMIC_RELAXED);
		return KH_EVICT_DONE;
	}
	n_bytes = kh_coder_pack(&store->coder, page, KH_PAGE_BYTES, record.content, WORTH_BYTES);
	if (n_bytes > 0)
		return put_record(store, index, &record, n_bytes, batch);
	if (store->refuse_raw)
		return KH_EVICT_REFUSED;
	memcpy(record.content, page, KH_PAGE_BYTES);
	return put_record(store, index, &record, KH_PAGE_BYTES, batch);
}

/* The record of an entry: where it lies in memory, or read into *room. NULL: unreadable. */
static const struct record *find_record(const struct kh_store *store, uint64_t entry,
					struct record *room)
{
	ssize_t wanted = RECORD_HEAD + bytes_of(entry), got;

	if (store->slab.fd < 0)
		return (const struct record *)kh_slab_address(&store->slab, slot_of(entry));
	do
		got = pread(store->slab.fd, room, wanted, kh_slab_offset(slot_of(entry)));
	while (got < 0 && errno == EINTR);
	return got == wanted ? room : NULL;
}

int kh_store_get(struct kh_store *store, uint64_t index, void *page)
{
	uint64_t entry = store->entry[index], n_bytes = bytes_of(entry);
	const struct record *record;
	struct record room;

	if (!is_same(store, index) && !entry)
		return -ENOENT;
	if (kh_take_injected(&store->failing_loads))
		return -EBADMSG;
	if (is_same(store, index)) {
		uint64_t *words = page;

		for (int i = 0; i < KH_PAGE_BYTES / 8; i++)
			words[i] = entry;
		return 0;
	}
	record = find_record(store, entry, &room);
	if (!record)
		return -EIO;
	if (record->checksum !=
	    kh_coder_checksum(&store->coder, record->content, n_bytes, index, batch_of(entry)))
		return -EBADMSG;
	if (n_bytes != KH_PAGE_BYTES)
		return kh_coder_unpack(&store->coder, record->content, n_bytes, page, KH_PAGE_BYTES);
	memcpy(page, record->content, KH_PAGE_BYTES);
	return 0;
}

int64_t kh_store_owner(const struct kh_store *store, uint64_t slot)
{
	uint64_t index;

	if (store->slab.fd < 0) {
		memcpy(&index, kh_slab_address(&store->slab, slot) + offsetof(struct record, index),
		       sizeof(index));
		return index;
	}
	if (pread(store->slab.fd, &index, sizeof(index),
		  kh_slab_offset(slot) + offsetof(struct record, index)) != sizeof(index))
		return -1;
	return index;
}

/* Copy the bytes unchanged: a damaged record stays damaged. */
int kh_store_move(struct kh_store *store, uint64_t index, uint64_t slot)
{
	uint64_t entry = store->entry[index];
	const struct record *record;
	struct record room;
	int64_t target;

	if (is_same(store, index) || !entry || slot_of(entry) != slot)
		return 0;
	record = find_record(store, entry, &room);
	target = record ? kh_slab_take_before(&store->slab, slot) : -1;
	if (target < 0)
		return 0;
	if (write_record(store, target, record, RECORD_HEAD + bytes_of(entry)) != KH_EVICT_DONE) {
		kh_slab_give(&store->slab, target);
		return 0;
	}
	store->entry[index] = make_entry(target, bytes_of(entry), batch_of(entry));
	kh_slab_give(&store->slab, slot);
	return 1;
}

void kh_store_drop(struct kh_store *store, uint64_t index)
{
	uint64_t entry = store->entry[index];

	if (is_same(store, index)) {
		__atomic_fetch_and(&store->same[index / 64], ~(1ull << (index % 64)),
				   __ATOMIC_RELAXED);
		__atomic_fetch_sub(&store->same_filled_pages, 1, __ATOMIC_RELAXED);
	} else if (entry) {
		kh_slab_give(&store->slab, slot_of(entry));
		__atomic_fetch_sub(&store->used_bytes, bytes_of(entry), __ATOMIC_RELAXED);
		if (bytes_of(entry) == KH_PAGE_BYTES)
			__atomic_fetch_sub(&store->raw_pages, 1, __ATOMIC_RELAXED);
	}
	store->entry[index] = 0;
}

uint64_t kh_store_bytes(const struct kh_store *store, uint64_t index)
{
	return is_same(store, index) ? sizeof(uint64_t) : bytes_of(store->entry[index]);
}

int kh_store_batch(const struct kh_store *store, uint64_t index)
{
	return is_same(store, index) ? -1 : (int)batch_of(store->entry[index]);
}
