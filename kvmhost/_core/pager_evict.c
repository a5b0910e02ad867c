/* How pages go: the steps of an eviction, dropping, and the host's own swap. */
#include "pager_internal.h"

#include "hostmem.h"
#include "uffd.h"

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

	return kh_punch(region->memfd, offset, n_pages * KH_PAGE_BYTES);
}

static int store_page(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t index)
{
	char page[KH_PAGE_BYTES] __attribute__((aligned(64)));
	off_t offset = (index - region->first) * KH_PAGE_BYTES;

	if (pread(region->memfd, page, sizeof(page), offset) != sizeof(page))
		return KH_EVICT_ERROR;
	return kh_store_put(&pager->store, index, page, pager->batch);
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
			kh_pager_set_state(pager, first + k, KH_PAGE_EVICTED);
			kh_pager_forget_history(pager, first + k);
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
		if (kh_bit(pager->pinned, first + i))
			outcome[i] = KH_EVICT_PINNED;
		else if (pager->state[first + i] != KH_PAGE_RESIDENT)
			outcome[i] = KH_EVICT_ABSENT;
		else if (known && !(resident >> i & 1))
			outcome[i] = KH_EVICT_ABSENT;
		else
			outcome[i] = known ? KH_EVICT_DONE : KH_EVICT_ERROR;
	}
}

#define TABLE_BYTES (2ull << 20)	/* what one page of the kernel's page tables maps */
#define TABLE_PAGES (TABLE_BYTES / KH_PAGE_BYTES)

/* Whether none of the pages is in a bitmap. */
static int is_clear(const uint64_t *words, uint64_t first, uint64_t n_pages)
{
	uint64_t end = first + n_pages;

	for (uint64_t base = first & ~63ull; base < end; base += 64) {
		uint64_t bits = __atomic_load_n(&words[base / 64], __ATOMIC_RELAXED);

		if (base < first)
			bits &= ~0ull << (first - base);
		if (end - base < 64)
			bits &= ~(~0ull << (end - base));
		if (bits)
			return 0;
	}
	return 1;
}

/*
 * Write protection fills page tables with markers, in both mappings, and the tables
 * stay: half a percent of the memory that they map. A zap of all that a table maps
 * gives it back since Linux 6.14. In the alias nothing is lost but the next touch's
 * few hundred ns; tables that the walkers read are pinned, and left alone. In the guest
 * mapping it must not look as if pages had been re-armed: only where none is left.
 */
static void give_back_table(const struct kh_pager_region *region, uint64_t first, uint64_t mapping,
			    const uint64_t *keep)
{
	uint64_t address = (mapping + (first - region->first) * KH_PAGE_BYTES) & ~(TABLE_BYTES - 1);
	uint64_t page;

	if (address < mapping || address + TABLE_BYTES > mapping + region->n_pages * KH_PAGE_BYTES)
		return;
	page = region->first + (address - mapping) / KH_PAGE_BYTES;
	if (is_clear(keep, page, TABLE_PAGES))
		madvise((void *)address, TABLE_BYTES, MADV_DONTNEED);
}

/* Not while neighbours still go: the tables would only be made again. */
static void give_back_tables(struct kh_pager *pager, uint64_t next_run)
{
	uint64_t first = pager->last_run - 1;
	const struct kh_pager_region *region;

	if (pager->last_run && (next_run - 1) / TABLE_PAGES != first / TABLE_PAGES) {
		region = kh_pager_region_of(pager, first);
		give_back_table(region, first, region->alias, pager->pinned);
		give_back_table(region, first, region->guest, pager->resident);
	}
	pager->last_run = next_run;
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
		give_back_tables(pager, first + 1);
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

	pager->batch++;
	for (uint64_t i = 0, length; i < n; i += length) {
		length = run_length(pager, index + i, n - i);
		evict_run(pager, index[i], length, outcome + i);
		for (uint64_t j = 0; j < length; j++)
			done += outcome[i + j] == KH_EVICT_DONE;
	}
	return done;
}

static int check_indexes(const struct kh_pager *pager, const uint32_t *index, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		if (index[i] >= pager->n_pages)
			return -ERANGE;
	return 0;
}

int64_t kh_pager_evict(struct kh_pager *pager, const uint32_t *index, uint64_t n,
		       uint8_t *outcome)
{
	int64_t done = 0;

	if (!kh_pager_is_armed(pager))
		return -EINVAL;
	if (check_indexes(pager, index, n))
		return -ERANGE;
	/* In pieces, so that the fault handler's own evictions get their turn. */
	for (uint64_t i = 0; i < n; i += KH_RUN_PAGES) {
		uint64_t piece = n - i < KH_RUN_PAGES ? n - i : KH_RUN_PAGES;

		kh_pager_lock_unfrozen(pager);
		done += evict_locked(pager, index + i, piece, outcome + i);
		if (i + piece == n)
			give_back_tables(pager, 0);
		pthread_mutex_unlock(&pager->evict_lock);
	}
	return done;
}

int64_t kh_pager_direct_evict(struct kh_pager *pager)
{
	uint32_t index[KH_RUN_PAGES];
	uint8_t outcome[KH_RUN_PAGES];
	int64_t done = 0;

	pthread_mutex_lock(&pager->evict_lock);
	/* The limit may have been lifted meanwhile: then what is there stays. */
	if (__atomic_load_n(&pager->limit_pages, __ATOMIC_RELAXED))
		done = evict_locked(pager, index, kh_pager_choose(pager, index, KH_RUN_PAGES),
				    outcome);
	pthread_mutex_unlock(&pager->evict_lock);
	__atomic_fetch_add(&pager->counters.direct_evictions, done, __ATOMIC_RELAXED);
	return done;
}

/* ---- pages that the guest has no more use for ------------------------- */

static void forget_page(struct kh_pager *pager, uint64_t index)
{
	uint8_t state = pager->state[index];

	COUNT(pager, dropped_pages);
	kh_pager_forget_history(pager, index);
	if (!kh_pager_is_armed(pager))
		return;
	kh_store_drop(&pager->store, index);
	if (state == KH_PAGE_EVICTED || state == KH_PAGE_LOST) {
		COUNT(pager, dropped_evicted_pages);
		UNCOUNT(pager, evicted_pages);
	} else if (state == KH_PAGE_RESIDENT) {
		UNCOUNT(pager, resident_pages);
	}
	kh_pager_set_state(pager, index, KH_PAGE_FRESH);
}

/* Neighbours, as in evict_run: a fault on one of them waits until all are gone. */
static void drop_run(struct kh_pager *pager, uint64_t first, uint64_t n_pages,
		     struct kh_drop_result *result)
{
	const struct kh_pager_region *region = kh_pager_region_of(pager, first);

	for (uint64_t i = first; i < first + n_pages; i++)
		kh_pager_lock_page(pager, i);
	for (uint64_t i = first, run; i < first + n_pages; i += run) {
		int pinned = kh_bit(pager->pinned, i), failed;

		for (run = 1; i + run < first + n_pages; run++)
			if (kh_bit(pager->pinned, i + run) != pinned)
				break;
		failed = pinned ? 0 : punch(region, i, run);
		for (uint64_t j = i; !pinned && !failed && j < i + run; j++)
			forget_page(pager, j);
		*(pinned ? &result->pinned : failed ? &result->failed : &result->dropped) += run;
	}
	for (uint64_t i = first; i < first + n_pages; i++)
		kh_pager_unlock_page(pager, i);
}

int kh_pager_drop(struct kh_pager *pager, uint64_t index, uint64_t n_pages,
		  struct kh_drop_result *result)
{
	*result = (struct kh_drop_result){ 0 };
	if (index > pager->n_pages || n_pages > pager->n_pages - index)
		return -ERANGE;
	for (uint64_t i = index, run; i < index + n_pages; i += run) {
		const struct kh_pager_region *region = kh_pager_region_of(pager, i);

		run = index + n_pages - i < KH_RUN_PAGES ? index + n_pages - i : KH_RUN_PAGES;
		if (i + run > region->first + region->n_pages)
			run = region->first + region->n_pages - i;
		kh_pager_lock_unfrozen(pager);
		drop_run(pager, i, run, result);
		pthread_mutex_unlock(&pager->evict_lock);
	}
	return 0;
}

/* ---- the host's swap --------------------------------------------------- */

/*
 * The kernel passes over pages that more than one mapping holds: the alias lets
 * go of them first. What has left the page cache is in the swap.
 */
static void pageout_run(struct kh_pager *pager, uint64_t first, uint64_t n_pages, uint8_t *outcome)
{
	const struct kh_pager_region *region = kh_pager_region_of(pager, first);
	uint64_t offset = (first - region->first) * KH_PAGE_BYTES, n_bytes = n_pages * KH_PAGE_BYTES;
	uint64_t before = 0, after = 0;
	int failed = kh_resident(region->alias + offset, n_pages, &before) ||
		     madvise((void *)(region->alias + offset), n_bytes, MADV_DONTNEED) ||
		     madvise((void *)(region->guest + offset), n_bytes, MADV_PAGEOUT) ||
		     kh_resident(region->alias + offset, n_pages, &after);

	for (uint64_t i = 0; i < n_pages; i++) {
		if (failed)
			outcome[i] = KH_EVICT_ERROR;
		else if (!(before >> i & 1))
			outcome[i] = KH_EVICT_ABSENT;
		else
			outcome[i] = after >> i & 1 ? KH_EVICT_REFUSED : KH_EVICT_DONE;
		if (outcome[i] == KH_EVICT_DONE)
			COUNT(pager, paged_out_pages);
	}
}

int64_t kh_pager_pageout(struct kh_pager *pager, const uint32_t *index, uint64_t n,
			 uint8_t *outcome)
{
	int64_t done = 0;

	if (check_indexes(pager, index, n))
		return -ERANGE;
	for (uint64_t i = 0, length; i < n; i += length) {
		length = run_length(pager, index + i, n - i);
		kh_pager_lock_unfrozen(pager);
		if (kh_bit(pager->pinned, index[i])) {
			outcome[i] = KH_EVICT_PINNED;
			length = 1;
		} else {
			for (uint64_t j = 1; j < length; j++)
				if (kh_bit(pager->pinned, index[i + j]))
					length = j;
			pageout_run(pager, index[i], length, outcome + i);
		}
		pthread_mutex_unlock(&pager->evict_lock);
		for (uint64_t j = 0; j < length; j++)
			done += outcome[i + j] == KH_EVICT_DONE;
	}
	return done;
}
