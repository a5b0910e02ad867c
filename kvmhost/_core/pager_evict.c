/* How pages go: the steps of an eviction, and who is chosen at the limit. */
#include "pager_internal.h"

#include "hostmem.h"
#include "uffd.h"

#include <fcntl.h>
#include <unistd.h>

static int protect_run(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t first,
		       uint64_t n_pages, int protect)
{
	uint64_t offset = (first - region->first) * KH_PAGE_BYTES, n_bytes = n_pages * KH_PAGE_BYTES;
	int guest = kh_uffd_write_protect(pager->uffd, region->guest + offset, n_bytes, protect);
	int alias = kh_uffd_write_protect(pager->uffd, region->alias + offset, n_bytes, protect);

	return guest ? guest : alias;
}

static int punch(const struct kh_pager_region *region, uint64_t first, uint64_t n_pages)
{
	off_t offset = (first - region->first) * KH_PAGE_BYTES;

	return fallocate(region->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset,
			 n_pages * KH_PAGE_BYTES) ? -errno : 0;
}

static int store_page(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t index)
{
	char page[KH_PAGE_BYTES] __attribute__((aligned(64)));
	off_t offset = (index - region->first) * KH_PAGE_BYTES;

	if (pread(region->memfd, page, sizeof(page), offset) != sizeof(page))
		return KH_EVICT_ERROR;
	return kh_store_put(&pager->store, index, page);
}

/* Punch the pages of a run that are in the store; cancel where that fails. */
static void commit_run(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t first,
		       uint64_t n_pages, uint8_t *outcome)
{
	for (uint64_t i = 0, j; i < n_pages; i = j) {
		int failed;

		for (j = i; j < n_pages && outcome[j] == KH_EVICT_DONE; j++)
			;
		if (j == i) {
			j++;
			continue;
		}
		failed = punch(region, first + i, j - i);
		for (uint64_t k = i; k < j; k++) {
			if (failed) {
				kh_store_drop(&pager->store, first + k);
				outcome[k] = KH_EVICT_ERROR;
				continue;
			}
			__atomic_store_n(&pager->state[first + k], KH_PAGE_EVICTED, __ATOMIC_RELEASE);
			pager->history[first + k] = 0;
			COUNT(pager, evictions);
			COUNT(pager, evicted_pages);
			UNCOUNT(pager, resident_pages);
		}
	}
}

static void sort_out(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t first,
		     uint64_t n_pages, uint8_t *outcome)
{
	uint64_t resident = 0;
	int known = !kh_resident(region->alias + (first - region->first) * KH_PAGE_BYTES, n_pages,
				 &resident);

	for (uint64_t i = 0; i < n_pages; i++) {
		if (pager->pinned[first + i])
			outcome[i] = KH_EVICT_PINNED;
		else if (pager->state[first + i] != KH_PAGE_RESIDENT)
			outcome[i] = KH_EVICT_ABSENT;
		else if (known && !(resident >> i & 1))
			outcome[i] = KH_EVICT_ABSENT;
		else
			outcome[i] = known ? KH_EVICT_DONE : KH_EVICT_ERROR;
	}
}

/*
 * Evict up to KH_RUN_PAGES neighbours. A write that comes in between meets the
 * write protection, sends a message, and its handler waits for the stripe: it
 * then finds the page evicted (and faults it in) or still there.
 */
static void evict_run(struct kh_pager *pager, uint64_t first, uint64_t n_pages, uint8_t *outcome)
{
	const struct kh_pager_region *region = kh_pager_region_of(pager, first);
	uint64_t wanted = 0;

	for (uint64_t i = 0; i < n_pages; i++)
		kh_pager_lock_page(pager, first + i);
	sort_out(pager, region, first, n_pages, outcome);
	for (uint64_t i = 0; i < n_pages; i++)
		wanted += outcome[i] == KH_EVICT_DONE;
	if (wanted) {
		int failed = protect_run(pager, region, first, n_pages, 1);

		for (uint64_t i = 0; i < n_pages; i++)
			if (outcome[i] == KH_EVICT_DONE)
				outcome[i] = failed ? KH_EVICT_ERROR
						    : store_page(pager, region, first + i);
		commit_run(pager, region, first, n_pages, outcome);
		/* Also drops the markers that the protection left where pages went. */
		protect_run(pager, region, first, n_pages, 0);
	}
	for (uint64_t i = 0; i < n_pages; i++)
		kh_pager_unlock_page(pager, first + i);
	for (uint64_t i = 0; i < n_pages; i++) {
		COUNT(pager, outcomes[outcome[i]]);
		if (outcome[i] == KH_EVICT_ERROR)
			COUNT(pager, errors);
	}
}

/* Neighbours at index[0], index[0] + 1, ... within one region. */
static uint64_t run_length(const struct kh_pager *pager, const uint32_t *index, uint64_t n)
{
	const struct kh_pager_region *region = kh_pager_region_of(pager, index[0]);
	uint64_t length = 1, room = region->first + region->n_pages - index[0];

	while (length < n && length < KH_RUN_PAGES && length < room &&
	       index[length] == index[0] + length)
		length++;
	return length;
}

static int64_t evict_locked(struct kh_pager *pager, const uint32_t *index, uint64_t n,
			    uint8_t *outcome)
{
	int64_t done = 0;

	for (uint64_t i = 0, length; i < n; i += length) {
		length = run_length(pager, index + i, n - i);
		evict_run(pager, index[i], length, outcome + i);
		for (uint64_t j = 0; j < length; j++)
			done += outcome[i + j] == KH_EVICT_DONE;
	}
	return done;
}

int64_t kh_pager_evict(struct kh_pager *pager, const uint32_t *index, uint64_t n,
		       uint8_t *outcome)
{
	int64_t done = 0;

	if (!pager->armed)
		return -EINVAL;
	for (uint64_t i = 0; i < n; i++)
		if (index[i] >= pager->n_pages)
			return -ERANGE;
	/* In pieces, so that the fault handler's own evictions get their turn. */
	for (uint64_t i = 0; i < n; i += KH_RUN_PAGES) {
		uint64_t piece = n - i < KH_RUN_PAGES ? n - i : KH_RUN_PAGES;

		pthread_mutex_lock(&pager->evict_lock);
		done += evict_locked(pager, index + i, piece, outcome + i);
		pthread_mutex_unlock(&pager->evict_lock);
	}
	return done;
}

/*
 * How many windows of its history a page may have been young in, to be taken by
 * the clock hand in its first, second, ... lap. A page that a scan touched once
 * goes before one that was young in every window.
 */
static const int lap_limits[] = { 0, 1, 3, 8 };

/* Next pages for the fault handler to evict: the daemon's wishes, then a clock. */
static uint64_t choose_victims(struct kh_pager *pager, uint32_t *index, uint64_t n)
{
	uint64_t found = 0;

	while (found < n && pager->next_victim < pager->n_victims) {
		uint32_t page = pager->victims[pager->next_victim++];

		/* Young since the daemon named it: leave it to the clock. */
		if (pager->state[page] == KH_PAGE_RESIDENT && !pager->pinned[page] &&
		    !(pager->history[page] & KH_HISTORY_NOW))
			index[found++] = page;
	}
	for (uint64_t lap = 0; !found && lap < sizeof(lap_limits) / sizeof(*lap_limits); lap++) {
		for (uint64_t step = 0; found < n && step < pager->n_pages; step++) {
			uint64_t page = pager->hand++ % pager->n_pages;

			if (pager->state[page] == KH_PAGE_RESIDENT && !pager->pinned[page] &&
			    __builtin_popcount(pager->history[page]) <= lap_limits[lap])
				index[found++] = page;
		}
	}
	return found;
}

int64_t kh_pager_direct_evict(struct kh_pager *pager)
{
	uint32_t index[KH_RUN_PAGES];
	uint8_t outcome[KH_RUN_PAGES];
	int64_t done = 0;

	pthread_mutex_lock(&pager->evict_lock);
	done = evict_locked(pager, index, choose_victims(pager, index, KH_RUN_PAGES), outcome);
	pthread_mutex_unlock(&pager->evict_lock);
	__atomic_fetch_add(&pager->counters.direct_evictions, done, __ATOMIC_RELAXED);
	return done;
}
