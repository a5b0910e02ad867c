#include "chunk.h"
#include "pager_internal.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

/* ---- the freeze ---------------------------------------------------------- */

void kh_pager_freeze(struct kh_pager *pager)
{
	/* Wait until the current holder of evict_lock releases it. */
	pthread_mutex_lock(&pager->evict_lock);
	pager->frozen++;
	pthread_mutex_unlock(&pager->evict_lock);
}

void kh_pager_thaw(struct kh_pager *pager)
{
	pthread_mutex_lock(&pager->evict_lock);
	pager->frozen--;
	pthread_cond_broadcast(&pager->thawed);
	pthread_mutex_unlock(&pager->evict_lock);
}

void kh_pager_lock_unfrozen(struct kh_pager *pager)
{
	pthread_mutex_lock(&pager->evict_lock);
	while (pager->frozen)
		pthread_cond_wait(&pager->thawed, &pager->evict_lock);
}

void kh_pager_wait_thawed(struct kh_pager *pager)
{
	kh_pager_lock_unfrozen(pager);
	pthread_mutex_unlock(&pager->evict_lock);
}

/* ---- reading ------------------------------------------------------------- */

static int is_zero(const char *page)
{
	uint64_t word;

	memcpy(&word, page, sizeof(word));
	return !word && !memcmp(page, page + sizeof(word), KH_PAGE_BYTES - sizeof(word));
}

/* Destination of a chunk that is read: pages are packed, zero pages are omitted. */
struct packing {
	struct kh_chunk *chunk;
	char *data;
};

static char *packing_end(const struct packing *to)
{
	return to->data + (uint64_t)to->chunk->n_held * KH_PAGE_BYTES;
}

/* A page was read to from, after the packed pages: keep it unless it is zero. */
static void keep(struct packing *to, uint32_t i, const char *from)
{
	if (is_zero(from))
		return;
	if (from != packing_end(to))
		memmove(packing_end(to), from, KH_PAGE_BYTES);
	to->chunk->held[i / 64] |= 1ull << (i % 64);
	to->chunk->n_held++;
}

static int read_fully(int fd, char *data, uint64_t n_bytes, uint64_t offset)
{
	while (n_bytes) {
		ssize_t got = pread(fd, data, n_bytes, offset);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return got ? -errno : -EIO;
		data += got, offset += got, n_bytes -= got;
	}
	return 0;
}

/* Read page by page, to find the one that cannot be read. */
static int read_one_by_one(struct packing *to, int memfd, uint64_t page, uint32_t first,
			   uint32_t end, uint32_t *bad)
{
	for (uint32_t i = first; i < end; i++) {
		char *at = packing_end(to);
		int result = read_fully(memfd, at, KH_PAGE_BYTES, (page + i) * KH_PAGE_BYTES);

		*bad = i;
		if (result)
			return result;
		keep(to, i, at);
	}
	return 0;
}

/*
 * Pages [first, end) of the chunk, all of which are in the memfd or nowhere. The
 * end of the data is not looked up: SEEK_HOLE would walk all data that follows. A
 * hole reads as zeros.
 */
static int read_memfd(struct packing *to, int memfd, uint64_t page, uint32_t first, uint32_t end,
		      uint32_t *bad)
{
	/* The first data; pages in the host's swap count as data. */
	off_t data = first < end ? lseek(memfd, (page + first) * KH_PAGE_BYTES, SEEK_DATA) : -1;
	const char *from = packing_end(to);

	if (first == end || (data < 0 && errno == ENXIO))
		return 0;
	if (data < 0)
		return -errno;
	if ((uint64_t)data / KH_PAGE_BYTES >= page + end)
		return 0;
	first = data / KH_PAGE_BYTES - page;
	if (read_fully(memfd, packing_end(to), (end - first) * (uint64_t)KH_PAGE_BYTES,
		       (page + first) * KH_PAGE_BYTES))
		return read_one_by_one(to, memfd, page, first, end, bad);
	for (; first < end; first++, from += KH_PAGE_BYTES)
		keep(to, first, from);
	return 0;
}

/* Read a page that was evicted at the last check. Returns 1 if it is in the memfd now. */
static int read_stored(struct kh_pager *pager, struct packing *to, uint64_t index, uint32_t i)
{
	char *at = packing_end(to);
	int result;

	kh_pager_lock_page(pager, index + i);
	switch (kh_pager_state_of(pager, index + i)) {
	case KH_PAGE_EVICTED:
		result = kh_store_get(&pager->store, index + i, at);
		break;
	case KH_PAGE_LOST:
		result = -EBADMSG;
		break;
	default:
		result = 1;
	}
	kh_pager_unlock_page(pager, index + i);
	if (!result)
		keep(to, i, at);
	return result;
}

static int is_in_memfd(const struct kh_pager *pager, uint64_t index)
{
	uint8_t state = kh_pager_state_of(pager, index);

	return state != KH_PAGE_EVICTED && state != KH_PAGE_LOST;
}

/* The caller holds evict_lock: pages may be faulted in meanwhile, but none is evicted. */
static int read_pages(struct kh_pager *pager, struct packing *to, int memfd, uint64_t page,
		      uint64_t index, uint32_t n_pages, uint32_t *bad)
{
	uint32_t i = 0;
	int result = 0;

	while (!result && i < n_pages) {
		uint32_t first = i;

		while (i < n_pages && (!pager || is_in_memfd(pager, index + i)))
			i++;
		*bad = first;
		result = read_memfd(to, memfd, page, first, i, bad);
		if (result || i == n_pages)
			break;
		*bad = i;
		result = read_stored(pager, to, index, i);
		/* Faulted in: the next round finds it in the memfd. */
		if (result == 1)
			result = 0;
		else
			i++;
	}
	return result;
}

int kh_chunk_read(struct kh_pager *pager, int memfd, uint64_t page, uint64_t index,
		  uint32_t n_pages, struct kh_chunk *chunk, void *data, uint32_t *bad)
{
	struct packing to = { chunk, data };
	int result;

	*chunk = (struct kh_chunk){ 0 };
	if (n_pages > KH_CHUNK_PAGES)
		return -EINVAL;
	if (pager && (index > pager->n_pages || n_pages > pager->n_pages - index))
		return -ERANGE;
	if (pager)
		pthread_mutex_lock(&pager->evict_lock);
	result = read_pages(pager, &to, memfd, page, index, n_pages, bad);
	if (pager)
		pthread_mutex_unlock(&pager->evict_lock);
	chunk->crc = chunk->n_held ? kh_crc32c(data, chunk->n_held * (uint64_t)KH_PAGE_BYTES) : 0;
	return result;
}

/* ---- filling ------------------------------------------------------------- */

static int is_held(const struct kh_chunk *chunk, uint32_t i)
{
	return chunk->held[i / 64] >> (i % 64) & 1;
}

static int write_fully(int fd, const char *data, uint64_t n_bytes, uint64_t offset)
{
	while (n_bytes) {
		ssize_t done = pwrite(fd, data, n_bytes, offset);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return done ? -errno : -EIO;
		data += done, offset += done, n_bytes -= done;
	}
	return 0;
}

static int fill_memfd(int memfd, uint64_t page, uint32_t n_pages, const struct kh_chunk *chunk,
		      const char *data)
{
	int result = 0;

	for (uint32_t i = 0, end; !result && i < n_pages; i = end) {
		uint64_t n_bytes;

		for (end = i; end < n_pages && is_held(chunk, end); end++)
			;
		n_bytes = (end - i) * (uint64_t)KH_PAGE_BYTES;
		result = n_bytes ? write_fully(memfd, data, n_bytes, (page + i) * KH_PAGE_BYTES) : 0;
		data += n_bytes;
		end += end == i;
	}
	return result;
}

/* The page's lock is held: no thread has touched the page yet, or the touch is blocked. */
static int fill_page(struct kh_pager *pager, int memfd, uint64_t offset, uint64_t index,
		     const char *data, int resident)
{
	int result;

	if (resident) {
		result = write_fully(memfd, data, KH_PAGE_BYTES, offset);
		if (!result)
			kh_pager_set_state(pager, index, KH_PAGE_RESIDENT);
		return result;
	}
	switch (kh_store_put(&pager->store, index, data, 0)) {
	case KH_EVICT_DONE:
		break;
	case KH_EVICT_FULL:
	case KH_EVICT_REFUSED:
		return -ENOSPC;
	default:
		return -EIO;
	}
	kh_pager_set_state(pager, index, KH_PAGE_EVICTED);
	return 0;
}

static int fill_pager(struct kh_pager *pager, int memfd, uint64_t page, uint64_t index,
		      uint32_t n_pages, const struct kh_chunk *chunk, const char *data,
		      uint64_t room, uint32_t *bad)
{
	uint64_t used = 0;

	for (uint32_t i = 0; i < n_pages; i++) {
		int pinned = kh_bit(pager->pinned, index + i), resident = pinned || used < room;
		int result;

		if (!is_held(chunk, i))
			continue;
		*bad = i;
		kh_pager_lock_page(pager, index + i);
		result = kh_pager_state_of(pager, index + i) == KH_PAGE_EVICTED ? -EEXIST :
			 fill_page(pager, memfd, (page + i) * KH_PAGE_BYTES, index + i, data,
				   resident);
		kh_pager_unlock_page(pager, index + i);
		if (result)
			return result;
		used += resident && !pinned;
		data += KH_PAGE_BYTES;
	}
	return used;
}

int kh_chunk_fill(struct kh_pager *pager, int memfd, uint64_t page, uint64_t index,
		  uint32_t n_pages, const struct kh_chunk *chunk, const void *data,
		  uint64_t room_pages, uint32_t *bad)
{
	const char *at = data;

	if (n_pages > KH_CHUNK_PAGES)
		return -EINVAL;
	if (pager && (index > pager->n_pages || n_pages > pager->n_pages - index))
		return -ERANGE;
	for (*bad = 0; *bad < n_pages; (*bad)++) {
		if (!is_held(chunk, *bad))
			continue;
		if (is_zero(at))
			return -EINVAL;
		at += KH_PAGE_BYTES;
	}
	*bad = 0;
	if (pager && kh_pager_is_armed(pager))
		return fill_pager(pager, memfd, page, index, n_pages, chunk, data, room_pages, bad);
	return fill_memfd(memfd, page, n_pages, chunk, data);
}

int kh_write_behind(int fd, uint64_t offset, uint64_t n_bytes, uint64_t distance)
{
	const unsigned int wait = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE |
				  SYNC_FILE_RANGE_WAIT_AFTER;

	/* The file system does not support it, or this is not a file: the final fsync is enough. */
	if (sync_file_range(fd, offset, n_bytes, SYNC_FILE_RANGE_WRITE))
		return errno == ENOSYS || errno == ESPIPE || errno == EINVAL ? 0 : -errno;
	if (offset < distance)
		return 0;
	offset -= distance;
	if (sync_file_range(fd, offset, n_bytes, wait))
		return -errno;
	posix_fadvise(fd, offset, n_bytes, POSIX_FADV_DONTNEED);
	return 0;
}
