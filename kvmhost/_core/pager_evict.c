/* The steps of an eviction, dropping pages, and the host's own swap. */
#include "pager_internal.h"

#include "hostmem.h"
#include "uffd.h"

#include <unistd.h>

int kh_pager_protect(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t first,
		     uint64_t n_pages, int protect)
{
	uint64_t offset = (first - region->first) * KH_PAGE_BYTES, n_bytes = n_pages * KH_PAGE_BYTES;
	int guest = kh_uffd_write_protect(pager->uffd, region->guest + offset, n_bytes, protect);
	int alias = kh_uffd_write_protect(pager->uffd, region->alias + offset, n_bytes, protect);

	return guest ? guest : alias;
}

static char *run_page(const struct kh_pager *pager, uint64_t i)
{
	return pager->run_pages + i * KH_PAGE_BYTES;
}

static int store_page(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t index,
		      char *page)
{
	off_t offset = (index - region->first) * KH_PAGE_BYTES;

	if (pread(region->memfd, page, KH_PAGE_BYTES, offset) != KH_PAGE_BYTES)
		return KH_EVICT_ERROR;
	return kh_store_put(&pager->store, index, page, pager->batch);
}

/* Which pages of a run the memfd holds, and which of these are in memory; 64 at most. */
static int look_at_run(const struct kh_pager *pager, const struct kh_pager_region *region,
		       uint64_t first, uint64_t n_pages, uint64_t *held, uint64_t *in_memory)
{
	uint64_t offset = (first - region->first) * KH_PAGE_BYTES;
	int result;

	*held = *in_memory = 0;
	result = kh_held(region->memfd, offset, n_pages, held);
	if (!result)
		result = kh_resident(region->alias + offset, n_pages, in_memory);
	for (uint64_t i = 0; pager->swap_fake && i < n_pages; i++)
		if (kh_bit(pager->swap_fake, first + i))
			*in_memory &= ~(1ull << i);
	return result;
}

/*
 * Punch pages that are in the store, and verify that the memfd no longer holds
 * them. A page that is still there is zeroed now: its contents are written back.
 */
static void commit_pages(struct kh_pager *pager, const struct kh_pager_region *region,
			 uint64_t first, uint64_t from, uint64_t to, uint8_t *outcome)
{
	uint64_t offset = (first + from - region->first) * KH_PAGE_BYTES, stayed = 0;
	int failed = kh_punch(region->memfd, offset, (to - from) * KH_PAGE_BYTES);

	/* Unknown: assume that the page is there, so that no data is lost. */
	if (kh_held(region->memfd, offset, to - from, &stayed))
		stayed = ~0ull;
	for (uint64_t i = from; i < to; i++) {
		if (stayed >> (i - from) & 1) {
			ssize_t written = pwrite(region->memfd, run_page(pager, i), KH_PAGE_BYTES,
						 offset + (i - from) * KH_PAGE_BYTES);

			outcome[i] = failed ? KH_EVICT_ERROR : KH_EVICT_STAYED;
			if (!failed)
				COUNT(pager, stayed_pages);
			if (written == KH_PAGE_BYTES) {
				kh_store_drop(&pager->store, first + i);
				continue;
			}
		}
		kh_pager_set_state(pager, first + i, KH_PAGE_EVICTED);
		kh_pager_forget_history(pager, first + i);
		COUNT(pager, evictions);
		kh_pager_log(pager, first + i, pager->evicting);
	}
}

static void commit_run(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t first,
		       uint64_t n_pages, uint8_t *outcome)
{
	for (uint64_t i = 0, j; i < n_pages; i = j + 1) {
		for (j = i; j < n_pages && outcome[j] == KH_EVICT_DONE; j++)
			;
		if (j > i)
			commit_pages(pager, region, first, i, j, outcome);
	}
}

/* Update the state of a page: the host swaps pages out and in without notification. */
static int sort_out_page(struct kh_pager *pager, uint64_t index, int held, int in_memory)
{
	uint8_t state = kh_pager_state_of(pager, index);

	int pinned = kh_bit(pager->pinned, index);

	if (state == KH_PAGE_EVICTED || state == KH_PAGE_LOST)
		return pinned ? KH_EVICT_PINNED : KH_EVICT_ABSENT;
	kh_pager_set_state(pager, index, !held ? KH_PAGE_FRESH
					 : in_memory ? KH_PAGE_RESIDENT
						     : KH_PAGE_SWAPPED);
	if (pinned)
		return KH_EVICT_PINNED;
	if (!held || !in_memory)
		return KH_EVICT_ABSENT;
	return kh_bit(pager->refused, index) ? KH_EVICT_REFUSED : KH_EVICT_DONE;
}

static void sort_out(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t first,
		     uint64_t n_pages, uint8_t *outcome)
{
	uint64_t held, in_memory;
	int failed = look_at_run(pager, region, first, n_pages, &held, &in_memory);

	for (uint64_t i = 0; i < n_pages; i++)
		outcome[i] = failed ? KH_EVICT_ERROR
				    : sort_out_page(pager, first + i, held >> i & 1,
						    in_memory >> i & 1);
}

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
 * stay: half a percent of the memory that they map. Since Linux 6.14 a zap of the
 * whole range of a table frees it. In the alias this costs only a few hundred ns at
 * the next touch; tables that the walkers read are pinned and skipped. In the guest
 * mapping the zap must not look like re-armed pages: it is done only where no page
 * is left.
 */
static void give_back_table(const struct kh_pager_region *region, uint64_t first, uint64_t mapping,
			    const uint64_t *keep)
{
	uint64_t address = (mapping + (first - region->first) * KH_PAGE_BYTES) & ~(KH_PIECE_BYTES - 1);
	uint64_t page;

	if (address < mapping || address + KH_PIECE_BYTES > mapping + region->n_pages * KH_PAGE_BYTES)
		return;
	page = region->first + (address - mapping) / KH_PAGE_BYTES;
	if (is_clear(keep, page, KH_PIECE_PAGES))
		madvise((void *)address, KH_PIECE_BYTES, MADV_DONTNEED);
}

/* Not while adjacent pages are still being evicted: the tables would be allocated again. */
static void give_back_tables(struct kh_pager *pager, uint64_t next_run)
{
	uint64_t first = pager->last_run - 1;
	const struct kh_pager_region *region;

	if (pager->last_run && (next_run - 1) / KH_PIECE_PAGES != first / KH_PIECE_PAGES) {
		region = kh_pager_region_of(pager, first);
		give_back_table(region, first, region->alias, pager->pinned);
		give_back_table(region, first, region->guest, pager->resident);
	}
	pager->last_run = next_run;
}

/*
 * Lift the protection, but not of pages that do not compress: the next write to one
 * sends a message, and until then a retry would fail again.
 */
static void lift_run(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t first,
		     uint64_t n_pages)
{
	for (uint64_t i = 0, j; i < n_pages; i = j + 1) {
		for (j = i; j < n_pages && !kh_bit(pager->refused, first + j); j++)
			;
		if (j > i)
			kh_pager_protect(pager, region, first + i, j - i, 0);
	}
}

static void store_and_punch(struct kh_pager *pager, const struct kh_pager_region *region,
			    uint64_t first, uint64_t n_pages, int in_huge_page, uint8_t *outcome)
{
	int failed = kh_pager_protect(pager, region, first, n_pages, 1);

	for (uint64_t i = 0; i < n_pages; i++) {
		if (outcome[i] != KH_EVICT_DONE)
			continue;
		outcome[i] = failed	    ? KH_EVICT_ERROR
			     : in_huge_page ? KH_EVICT_STAYED
					    : store_page(pager, region, first + i,
							 run_page(pager, i));
		if (outcome[i] == KH_EVICT_REFUSED)
			kh_bit_set(pager->refused, first + i);
	}
	commit_run(pager, region, first, n_pages, outcome);
	/* Also drops the markers that the protection left for evicted pages. */
	lift_run(pager, region, first, n_pages);
	give_back_tables(pager, first + 1);
}

static void count_outcomes(struct kh_pager *pager, uint64_t first, uint64_t n_pages,
			   const uint8_t *outcome)
{
	for (uint64_t i = 0; i < n_pages; i++) {
		COUNT(pager, outcomes[outcome[i]]);
		if (outcome[i] == KH_EVICT_ERROR)
			COUNT(pager, errors);
		if (outcome[i] != KH_EVICT_DONE)
			kh_bit_set(pager->passed, first + i);
	}
}

/*
 * Evict up to KH_RUN_PAGES adjacent pages of one piece. A concurrent write hits the
 * write protection, sends a message, and its handler waits for the stripe: it then
 * finds the page evicted (and faults it in) or still resident.
 */
static void evict_run(struct kh_pager *pager, uint64_t first, uint64_t n_pages, uint8_t *outcome)
{
	const struct kh_pager_region *region = kh_pager_region_of(pager, first);
	int in_huge_page = kh_huge_hold(pager, region, first, n_pages) != 0;
	uint64_t wanted = 0;

	for (uint64_t i = 0; i < n_pages; i++)
		kh_pager_lock_page(pager, first + i);
	sort_out(pager, region, first, n_pages, outcome);
	for (uint64_t i = 0; i < n_pages; i++)
		wanted += outcome[i] == KH_EVICT_DONE;
	if (wanted)
		store_and_punch(pager, region, first, n_pages, in_huge_page, outcome);
	for (uint64_t i = 0; i < n_pages; i++)
		kh_pager_unlock_page(pager, first + i);
	kh_huge_release(pager);
	count_outcomes(pager, first, n_pages, outcome);
}

/* Number of pages from a page to the end of its piece. */
static uint64_t room_in_piece(const struct kh_pager_region *region, uint64_t index)
{
	uint64_t room = KH_PIECE_PAGES - (index - region->first) % KH_PIECE_PAGES;
	uint64_t rest = region->first + region->n_pages - index;

	return room < rest ? room : rest;
}

/* Number of adjacent pages index[0], index[0] + 1, ... within one piece of a region. */
static uint64_t run_length(const struct kh_pager *pager, const uint32_t *index, uint64_t n)
{
	const struct kh_pager_region *region = kh_pager_region_of(pager, index[0]);
	uint64_t length = 1, room = room_in_piece(region, index[0]);

	while (length < n && length < KH_RUN_PAGES && length < room &&
	       index[length] == index[0] + length)
		length++;
	return length;
}

static int64_t evict_locked(struct kh_pager *pager, const uint32_t *index, uint64_t n,
			    uint32_t event, uint8_t *outcome)
{
	int64_t done = 0;

	pager->evicting = event;
	pager->batch++;
	/* At the limit of the store, this frees space. */
	if (__atomic_load_n(&pager->store.slab.limit_bytes, __ATOMIC_RELAXED))
		while (kh_pager_tidy_locked(pager))
			;
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

int64_t kh_pager_evict(struct kh_pager *pager, const uint32_t *index, uint64_t n, uint32_t event,
		       uint8_t *outcome)
{
	int64_t done = 0;

	if (!kh_pager_is_armed(pager))
		return -EINVAL;
	if (event > KH_EVENT_EVICTED_MEMORY)
		return -EINVAL;
	if (check_indexes(pager, index, n))
		return -ERANGE;
	/* In pieces, so that the fault handler's own evictions are not delayed. */
	for (uint64_t i = 0; i < n; i += KH_RUN_PAGES) {
		uint64_t piece = n - i < KH_RUN_PAGES ? n - i : KH_RUN_PAGES;

		kh_pager_lock_unfrozen(pager);
		done += evict_locked(pager, index + i, piece, event, outcome + i);
		if (i + piece == n)
			give_back_tables(pager, 0);
		pthread_mutex_unlock(&pager->evict_lock);
	}
	return done;
}

uint64_t kh_pager_evict_some(struct kh_pager *pager, uint32_t event, uint64_t *went)
{
	uint32_t index[KH_RUN_PAGES];
	uint8_t outcome[KH_RUN_PAGES];
	uint64_t tried;

	pthread_mutex_lock(&pager->evict_lock);
	tried = kh_pager_choose(pager, index, KH_RUN_PAGES);
	*went = evict_locked(pager, index, tried, event, outcome);
	pthread_mutex_unlock(&pager->evict_lock);
	return tried;
}

int kh_pager_is_over(const struct kh_pager *pager)
{
	uint64_t limit = __atomic_load_n(&pager->limit_pages, __ATOMIC_RELAXED);

	return limit && __atomic_load_n(&pager->counters.resident_pages, __ATOMIC_RELAXED) > limit;
}

void kh_pager_shrink(struct kh_pager *pager, struct kh_shrink_result *result)
{
	uint64_t tried = 1, resident, limit;

	*result = (struct kh_shrink_result){ 0 };
	kh_pager_lock_unfrozen(pager);
	kh_pager_new_round(pager);
	kh_pager_look_at_swapped(pager);
	pthread_mutex_unlock(&pager->evict_lock);
	/* The guest may fault pages in meanwhile; the loop is bounded nevertheless. */
	while (tried && kh_pager_is_over(pager) && result->evicted < pager->n_pages) {
		uint64_t went;

		kh_pager_wait_thawed(pager);
		tried = kh_pager_evict_some(pager, KH_EVENT_EVICTED_LIMIT, &went);
		result->evicted += went;
	}
	__atomic_fetch_add(&pager->counters.direct_evictions, result->evicted, __ATOMIC_RELAXED);
	limit = __atomic_load_n(&pager->limit_pages, __ATOMIC_RELAXED);
	resident = __atomic_load_n(&pager->counters.resident_pages, __ATOMIC_RELAXED);
	result->over_pages = limit && resident > limit ? resident - limit : 0;
}

/* ---- pages that the guest declared free ------------------------- */

/* After a touch of a lost page its alias raises SIGBUS: make it ordinary memory again. */
static void unpoison(struct kh_pager *pager, uint64_t index)
{
	const struct kh_pager_region *region = kh_pager_region_of(pager, index);
	uint64_t offset = (index - region->first) * KH_PAGE_BYTES;
	void *page = (void *)(region->alias + offset);

	if (mmap(page, KH_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
		 region->memfd, offset) == MAP_FAILED ||
	    kh_uffd_register(pager->uffd, region->alias + offset, KH_PAGE_BYTES,
			     KH_UFFD_MISSING | KH_UFFD_WP))
		COUNT(pager, errors);
}

static void forget_page(struct kh_pager *pager, uint64_t index, int stayed)
{
	uint8_t state = kh_pager_state_of(pager, index);

	COUNT(pager, dropped_pages);
	kh_pager_log(pager, index, KH_EVENT_DROPPED);
	kh_pager_forget_history(pager, index);
	if (!kh_pager_is_armed(pager))
		return;
	kh_store_drop(&pager->store, index);
	if (state == KH_PAGE_EVICTED || state == KH_PAGE_LOST)
		COUNT(pager, dropped_evicted_pages);
	if (state == KH_PAGE_LOST)
		unpoison(pager, index);
	if (stayed)
		COUNT(pager, stayed_pages);
	/* A page that was not freed is zeroed, as required, and still uses memory. */
	kh_pager_set_state(pager, index, stayed ? KH_PAGE_RESIDENT : KH_PAGE_FRESH);
	kh_bit_clear(pager->refused, index);
}

/* Drop pages that are either all pinned or all not. */
static void drop_pages(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t first,
		       uint64_t n_pages, struct kh_drop_result *result)
{
	uint64_t offset = (first - region->first) * KH_PAGE_BYTES, stayed = 0;

	if (kh_bit(pager->pinned, first)) {
		result->pinned += n_pages;
		return;
	}
	if (kh_punch(region->memfd, offset, n_pages * KH_PAGE_BYTES)) {
		result->failed += n_pages;
		return;
	}
	kh_held(region->memfd, offset, n_pages, &stayed);
	for (uint64_t i = 0; i < n_pages; i++)
		forget_page(pager, first + i, stayed >> i & 1);
	result->dropped += n_pages;
}

/* Adjacent pages, as in evict_run: a fault on one of them waits until all are dropped. */
static void drop_run(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t first,
		     uint64_t n_pages, struct kh_drop_result *result)
{
	if (kh_pager_is_armed(pager))
		/* Else pages beside them would be left in folios of any size. */
		(void)kh_huge_hold(pager, region, first, n_pages);
	for (uint64_t i = first; i < first + n_pages; i++)
		kh_pager_lock_page(pager, i);
	for (uint64_t i = first, run; i < first + n_pages; i += run) {
		for (run = 1; i + run < first + n_pages; run++)
			if (kh_bit(pager->pinned, i + run) != kh_bit(pager->pinned, i))
				break;
		drop_pages(pager, region, i, run, result);
	}
	for (uint64_t i = first; i < first + n_pages; i++)
		kh_pager_unlock_page(pager, i);
	kh_huge_release(pager);
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
		if (run > room_in_piece(region, i))
			run = room_in_piece(region, i);
		kh_pager_lock_unfrozen(pager);
		drop_run(pager, region, i, run, result);
		pthread_mutex_unlock(&pager->evict_lock);
	}
	kh_pager_tidy_all(pager);
	return 0;
}

/* ---- the host's swap --------------------------------------------------- */

static void note_swapped(struct kh_pager *pager, uint64_t index)
{
	kh_pager_lock_page(pager, index);
	if (kh_pager_is_armed(pager) && kh_pager_state_of(pager, index) == KH_PAGE_RESIDENT)
		kh_pager_set_state(pager, index, KH_PAGE_SWAPPED);
	kh_pager_unlock_page(pager, index);
}

/*
 * The kernel passes over pages that more than one mapping holds: zap the alias
 * first. Pages that the memfd holds but that are not in memory are in the swap.
 */
static void pageout_run(struct kh_pager *pager, uint64_t first, uint64_t n_pages, uint8_t *outcome)
{
	const struct kh_pager_region *region = kh_pager_region_of(pager, first);
	uint64_t offset = (first - region->first) * KH_PAGE_BYTES, n_bytes = n_pages * KH_PAGE_BYTES;
	uint64_t held, before, after;
	int failed = look_at_run(pager, region, first, n_pages, &held, &before) ||
		     madvise((void *)(region->alias + offset), n_bytes, MADV_DONTNEED) ||
		     madvise((void *)(region->guest + offset), n_bytes, MADV_PAGEOUT) ||
		     look_at_run(pager, region, first, n_pages, &held, &after);

	for (uint64_t i = 0; i < n_pages; i++) {
		if (failed)
			outcome[i] = KH_EVICT_ERROR;
		else if (!(before >> i & 1))
			outcome[i] = KH_EVICT_ABSENT;
		else
			outcome[i] = after >> i & 1 ? KH_EVICT_REFUSED : KH_EVICT_DONE;
		if (outcome[i] != KH_EVICT_DONE)
			continue;
		COUNT(pager, paged_out_pages);
		note_swapped(pager, first + i);
	}
}

void kh_pager_look_at_swapped(struct kh_pager *pager)
{
	if (!__atomic_load_n(&pager->counters.swapped_pages, __ATOMIC_RELAXED))
		return;
	for (uint64_t i = 0; i < pager->n_pages; i++) {
		const struct kh_pager_region *region = kh_pager_region_of(pager, i);
		uint64_t held, in_memory;

		if (kh_pager_state_of(pager, i) != KH_PAGE_SWAPPED)
			continue;
		kh_pager_lock_page(pager, i);
		if (!look_at_run(pager, region, i, 1, &held, &in_memory) &&
		    kh_pager_state_of(pager, i) == KH_PAGE_SWAPPED)
			(void)sort_out_page(pager, i, held & 1, in_memory & 1);
		kh_pager_unlock_page(pager, i);
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
