/*
 * Huge pages. To punch a part of a folio, the kernel zeroes that part and then
 * tries to split the folio; if anyone holds a reference to it, the split fails, and
 * the pages are still there, zeroed, for all to read. A folio that is punched whole
 * is removed regardless of references. So a piece of memory, aligned as the largest
 * folio is, that has a huge page is copied out, punched whole and filled again with
 * small pages before any page of it is evicted; a thread that touches the piece
 * meanwhile waits. Source: truncate_inode_partial_folio(), mm/truncate.c, v6.18.
 */
#include "pager_internal.h"

#include "hostmem.h"
#include "uffd.h"

#include <fcntl.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* The kernel maps up to this number of pages around a small page that is touched. */
#define FAULT_AROUND_BYTES (64ull << 10)

int kh_huge_init(struct kh_pager *pager, int split_all)
{
	uint64_t n_pieces = pager->max_pages / KH_PIECE_PAGES + 2 * KH_MAX_REGIONS;
	void *space;

	if (split_all)
		memset(pager->mixed, 0xff, (n_pieces + 63) / 64 * sizeof(uint64_t));
	/* Disable huge pages in these mappings; a kernel without THP returns an error. */
	for (uint32_t i = 0; i < pager->n_regions; i++) {
		const struct kh_pager_region *region = &pager->regions[i];
		uint64_t n_bytes = region->n_pages * KH_PAGE_BYTES;

		(void)madvise((void *)region->guest, n_bytes, MADV_NOHUGEPAGE);
		(void)madvise((void *)region->alias, n_bytes, MADV_NOHUGEPAGE);
	}
	if (pager->scratch)
		return 0;
	space = mmap(NULL, 2 * KH_PIECE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
		     -1, 0);
	if (space == MAP_FAILED)
		return -errno;
	pager->scratch = (uintptr_t)space;
	pager->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	return pipe2(pager->pipe, O_CLOEXEC | O_NONBLOCK) ? -errno : 0;
}

void kh_huge_destroy(struct kh_pager *pager)
{
	if (pager->scratch)
		munmap((void *)pager->scratch, 2 * KH_PIECE_BYTES);
	if (pager->pagemap >= 0)
		close(pager->pagemap);
	for (int i = 0; i < 2; i++)
		if (pager->pipe[i] >= 0)
			close(pager->pipe[i]);
}

/* Number of a piece over all regions; every region begins with a new piece. */
static uint64_t piece_number(const struct kh_pager *pager, const struct kh_pager_region *region,
			     uint64_t piece)
{
	uint64_t number = piece;

	for (const struct kh_pager_region *before = pager->regions; before < region; before++)
		number += before->n_pages / KH_PIECE_PAGES + 1;
	return number;
}

/* Map a piece where a huge page is mapped as one; no other code uses the mapping. */
static char *map_piece(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t piece)
{
	uint64_t aligned = (pager->scratch + KH_PIECE_BYTES - 1) & ~(KH_PIECE_BYTES - 1);
	void *mapping;

	if (pager->mapped_piece == region->first + piece * KH_PIECE_PAGES + 1)
		return (char *)aligned;
	mapping = mmap((void *)aligned, KH_PIECE_BYTES, PROT_READ, MAP_SHARED | MAP_FIXED,
		       region->memfd, piece * KH_PIECE_BYTES);

	pager->mapped_piece = mapping == MAP_FAILED ? 0 : region->first + piece * KH_PIECE_PAGES + 1;
	return mapping == MAP_FAILED ? NULL : mapping;
}

/* Take a reference to a page: a piece with such a page does not become a huge page. */
static int hold_page(struct kh_pager *pager, char *address)
{
	struct iovec page = { .iov_base = address, .iov_len = KH_PAGE_BYTES };
	ssize_t got;

	do
		got = vmsplice(pager->pipe[1], &page, 1, 0);
	while (got < 0 && errno == EINTR);
	return got == KH_PAGE_BYTES ? 0 : got < 0 ? -errno : -EIO;
}

void kh_huge_release(struct kh_pager *pager)
{
	char page[KH_PAGE_BYTES];

	while (read(pager->pipe[0], page, sizeof(page)) > 0)
		;
}

/* Whether a piece is mapped as a whole, after one page of it was touched. */
static int is_mapped_whole(const struct kh_pager *pager, const char *mapping, uint64_t page)
{
	uint64_t touched = page * KH_PAGE_BYTES, entry = 0;
	uint64_t far = touched + 2 * FAULT_AROUND_BYTES < KH_PIECE_BYTES
			       ? touched + 2 * FAULT_AROUND_BYTES
			       : touched - 2 * FAULT_AROUND_BYTES;
	off_t offset = ((uintptr_t)mapping + far) / KH_PAGE_BYTES * sizeof(entry);

	/* Unreadable: assume a huge page, at the cost of a copy. */
	if (pread(pager->pagemap, &entry, sizeof(entry), offset) != sizeof(entry))
		return 1;
	return entry >> 63 & 1;
}

static void lock_all(struct kh_pager *pager)
{
	for (int i = 0; i < KH_STRIPES; i++)
		pthread_mutex_lock(&pager->stripes[i]);
}

static void unlock_all(struct kh_pager *pager)
{
	for (int i = KH_STRIPES; i-- > 0;)
		pthread_mutex_unlock(&pager->stripes[i]);
}

/* Wait for memory: the buffer holds the only copy. */
static void pause_for_memory(void)
{
	struct timespec pause = { .tv_nsec = 1000000 };

	nanosleep(&pause, NULL);
}

/* Fill pages [from, to) of a piece again; a page for which there is no memory is evicted. */
static void refill(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t first,
		   const char *pages, uint64_t from, uint64_t to)
{
	uint64_t alias = region->alias + (first - region->first) * KH_PAGE_BYTES;

	while (from < to) {
		uint64_t done, address = alias + from * KH_PAGE_BYTES;
		const char *page = pages + from * KH_PAGE_BYTES;
		int result = kh_uffd_copy_range(pager->uffd, address, page,
						(to - from) * KH_PAGE_BYTES, &done);

		from += done / KH_PAGE_BYTES;
		if (!result || from == to)
			continue;
		if (result == -EEXIST) {
			from++;
			continue;
		}
		page = pages + from * KH_PAGE_BYTES;
		if (kh_store_put(&pager->store, first + from, page, pager->batch) == KH_EVICT_DONE) {
			kh_pager_set_state(pager, first + from, KH_PAGE_EVICTED);
			COUNT(pager, evictions);
			kh_pager_log(pager, first + from, KH_EVENT_EVICTED_MEMORY);
			from++;
			continue;
		}
		pause_for_memory();
	}
}

/* Restore the contents of pages that are still in memory, zeroed; returns their number. */
static uint64_t give_back(const struct kh_pager_region *region, uint64_t offset, uint64_t n_pages,
			  const char *pages, uint64_t *held)
{
	uint64_t there[KH_PIECE_PAGES / 64] = { 0 }, stayed = 0;

	kh_held(region->memfd, offset, n_pages, there);
	for (uint64_t i = 0; i < n_pages; i++) {
		if (!kh_bit(there, i) || !kh_bit(held, i))
			continue;
		stayed += pwrite(region->memfd, pages + i * KH_PAGE_BYTES, KH_PAGE_BYTES,
				 offset + i * KH_PAGE_BYTES) == KH_PAGE_BYTES;
		kh_bit_clear(held, i);
	}
	return stayed;
}

/* Copy a piece out, punch it whole, and fill it again. */
static int rebuild(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t first,
		   uint64_t n_pages, char *pages)
{
	uint64_t offset = (first - region->first) * KH_PAGE_BYTES, stayed;
	uint64_t held[KH_PIECE_PAGES / 64] = { 0 };
	int result = kh_held(region->memfd, offset, n_pages, held);

	if (result)
		return result;
	for (uint64_t i = 0; i < n_pages; i++)
		if (kh_bit(held, i) &&
		    pread(region->memfd, pages + i * KH_PAGE_BYTES, KH_PAGE_BYTES,
			  offset + i * KH_PAGE_BYTES) != KH_PAGE_BYTES)
			return -EIO;
	/* Punch to the end of the piece even if the file ends before: the folio may be longer. */
	result = kh_punch(region->memfd, offset, KH_PIECE_BYTES);
	stayed = give_back(region, offset, n_pages, pages, held);
	__atomic_fetch_add(&pager->counters.stayed_pages, stayed, __ATOMIC_RELAXED);
	for (uint64_t i = 0, to; i < n_pages; i = to + 1) {
		for (to = i; to < n_pages && kh_bit(held, to); to++)
			;
		refill(pager, region, first, pages, i, to);
	}
	return result ? result : stayed ? -EBUSY : 0;
}

/* Convert a piece to small pages. Every page of it is locked, and so are all others. */
static int split_piece(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t piece)
{
	uint64_t first = region->first + piece * KH_PIECE_PAGES;
	uint64_t rest = region->first + region->n_pages - first;
	uint64_t n_pages = rest < KH_PIECE_PAGES ? rest : KH_PIECE_PAGES;
	char *pages = mmap(NULL, KH_PIECE_BYTES, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int result;

	if (pages == MAP_FAILED)
		return -errno;
	lock_all(pager);
	result = kh_pager_protect(pager, region, first, n_pages, 1);
	if (!result)
		result = rebuild(pager, region, first, n_pages, pages);
	kh_pager_protect(pager, region, first, n_pages, 0);
	/* The write protection that would report a write was removed. */
	for (uint64_t i = first; i < first + n_pages; i++)
		kh_bit_clear(pager->refused, i);
	unlock_all(pager);
	munmap(pages, KH_PIECE_BYTES);
	COUNT(pager, split_pieces);
	return result;
}

int kh_huge_hold(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t first,
		 uint64_t n_pages)
{
	uint64_t piece = (first - region->first) / KH_PIECE_PAGES, held = 0, page;
	uint64_t number = piece_number(pager, region, piece);
	char *mapping;
	int result = kh_held(region->memfd, (first - region->first) * KH_PAGE_BYTES, n_pages, &held);

	if (result || !held || kh_take_injected(&pager->failing_splits))
		return result;
	/* A resident page stays resident: only this thread evicts. */
	page = (first - region->first) % KH_PIECE_PAGES + __builtin_ctzll(held);
	mapping = map_piece(pager, region, piece);
	if (!mapping)
		return -errno;
	result = hold_page(pager, mapping + page * KH_PAGE_BYTES);
	if (!result && (kh_bit(pager->mixed, number) || is_mapped_whole(pager, mapping, page))) {
		result = split_piece(pager, region, piece);
		if (!result)
			kh_bit_clear(pager->mixed, number);
	}
	/* The next touch must be detected again. */
	madvise(mapping, KH_PIECE_BYTES, MADV_DONTNEED);
	return result;
}
