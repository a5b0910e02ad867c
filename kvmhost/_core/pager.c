#include "pager_internal.h"

#include "hostmem.h"
#include "uffd.h"

#include <malloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define DEFAULT_MEMORY_WAIT_NS (60 * 1000000000ull)

/* State per page: 10 bytes and 5 bits, none of which is touched before its first use. */
static int make_tables(struct kh_pager *pager, const struct kh_codec *codec, int store_fd)
{
	uint64_t n_words = pager->max_pages / 64 + 1;
	int result = kh_store_init(&pager->store, pager->max_pages, codec, store_fd);

	pager->state = calloc(pager->max_pages + 1, 1);
	pager->resident = calloc(n_words, sizeof(uint64_t));
	pager->pinned = calloc(n_words, sizeof(uint64_t));
	pager->refused = calloc(n_words, sizeof(uint64_t));
	pager->passed = calloc(n_words, sizeof(uint64_t));
	pager->mixed = calloc((pager->max_pages / KH_PIECE_PAGES + 2 * KH_MAX_REGIONS) / 64 + 1,
			      sizeof(uint64_t));
	pager->history = calloc(n_words, sizeof(struct kh_history));
	pager->run_pages = aligned_alloc(64, KH_RUN_PAGES * KH_PAGE_BYTES);
	if (!pager->state || !pager->resident || !pager->pinned || !pager->refused ||
	    !pager->passed || !pager->mixed || !pager->history || !pager->run_pages)
		return -ENOMEM;
	return result ? result : kh_log_init(&pager->log, pager->max_pages);
}

struct kh_pager *kh_pager_new(int uffd, uint64_t n_pages, const struct kh_codec *codec,
			      int store_fd)
{
	struct kh_pager *pager = calloc(1, sizeof(*pager));

	if (!pager)
		return NULL;
	/*
	 * A process under a memory limit serves requests from several threads: one
	 * malloc arena per thread would waste tens of MiB.
	 */
	mallopt(M_ARENA_MAX, 1);
	pager->uffd = uffd;
	pager->stop_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pager->failure_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pager->pipe[0] = pager->pipe[1] = pager->pagemap = -1;
	pager->memory_wait_ns = DEFAULT_MEMORY_WAIT_NS;
	pager->max_pages = n_pages;
	pthread_mutex_init(&pager->evict_lock, NULL);
	pthread_cond_init(&pager->thawed, NULL);
	pthread_mutex_init(&pager->serving_lock, NULL);
	pthread_cond_init(&pager->serving_changed, NULL);
	for (int i = 0; i < KH_STRIPES; i++)
		pthread_mutex_init(&pager->stripes[i], NULL);
	if (make_tables(pager, codec, store_fd) || pager->stop_event < 0 || pager->failure_event < 0) {
		kh_pager_free(pager);
		return NULL;
	}
	return pager;
}

int64_t kh_pager_add_region(struct kh_pager *pager, int memfd, uint64_t guest, uint64_t alias,
			    uint64_t n_pages)
{
	uint64_t total = pager->n_pages + n_pages, first = pager->n_pages;

	if (kh_pager_is_armed(pager))
		return -EBUSY;
	if (pager->n_regions == KH_MAX_REGIONS || total > pager->max_pages)
		return -ENOSPC;
	pager->regions[pager->n_regions++] = (struct kh_pager_region){ memfd, guest, alias, first, n_pages };
	pager->n_pages = total;
	return first;
}

/* Find which pages of a region exist; from here on the fault handler keeps this up to date. */
static int take_stock(struct kh_pager *pager, const struct kh_pager_region *region)
{
	uint64_t n_words = (region->n_pages + 63) / 64;
	uint64_t *held = calloc(2 * n_words, sizeof(*held)), *in_memory = held + n_words;
	int result;

	if (!held)
		return -ENOMEM;
	result = kh_held(region->memfd, 0, region->n_pages, held);
	if (!result)
		result = kh_resident(region->alias, region->n_pages, in_memory);
	for (uint64_t i = 0; !result && i < region->n_pages; i++) {
		uint64_t index = region->first + i;
		int there = kh_bit(in_memory, i) &&
			    !(pager->swap_fake && kh_bit(pager->swap_fake, index));

		kh_pager_set_state(pager, index, !kh_bit(held, i) ? KH_PAGE_FRESH
						 : there	    ? KH_PAGE_RESIDENT
								    : KH_PAGE_SWAPPED);
	}
	free(held);
	return result;
}

/* The mappings in the order in which they are registered: guest and alias of each region. */
static uint64_t mapping(const struct kh_pager *pager, uint32_t number, uint64_t *n_bytes)
{
	const struct kh_pager_region *region = &pager->regions[number / 2];

	*n_bytes = region->n_pages * KH_PAGE_BYTES;
	return number % 2 ? region->alias : region->guest;
}

/* Undo the first n registrations, last one first; waiters for a page there wake up. */
static void unregister(struct kh_pager *pager, uint32_t n)
{
	while (n-- > 0) {
		uint64_t n_bytes, address = mapping(pager, n, &n_bytes);

		kh_uffd_unregister(pager->uffd, address, n_bytes);
	}
}

static int register_all(struct kh_pager *pager)
{
	for (uint32_t i = 0; i < 2 * pager->n_regions; i++) {
		uint64_t n_bytes, address = mapping(pager, i, &n_bytes);
		int result = kh_uffd_register(pager->uffd, address, n_bytes,
					      KH_UFFD_MISSING | KH_UFFD_WP);

		if (result) {
			unregister(pager, i);
			return result;
		}
	}
	return 0;
}

static int take_all_stock(struct kh_pager *pager)
{
	int result = 0;

	/* All begin as resident. */
	memset(pager->state, KH_PAGE_RESIDENT, pager->n_pages);
	__atomic_store_n(&pager->counters.resident_pages, pager->n_pages, __ATOMIC_RELAXED);
	__atomic_store_n(&pager->counters.swapped_pages, 0, __ATOMIC_RELAXED);
	for (uint32_t i = 0; !result && i < pager->n_regions; i++)
		result = take_stock(pager, &pager->regions[i]);
	if (result)
		__atomic_store_n(&pager->counters.resident_pages, 0, __ATOMIC_RELAXED);
	return result;
}

int kh_pager_arm(struct kh_pager *pager, int split_all)
{
	int result = 0;

	/* Pages dropped concurrently would be counted incorrectly. */
	kh_pager_lock_unfrozen(pager);
	if (kh_pager_is_armed(pager))
		goto out;
	result = kh_huge_init(pager, split_all);
	if (result)
		goto out;
	/* Faults from here on wait until serve() sees that all regions are armed. */
	result = register_all(pager);
	if (result)
		goto out;
	result = take_all_stock(pager);
	if (result) {
		unregister(pager, 2 * pager->n_regions);
		goto out;
	}
	pthread_mutex_lock(&pager->serving_lock);
	__atomic_store_n(&pager->armed, 1, __ATOMIC_RELEASE);
	pthread_cond_broadcast(&pager->serving_changed);
	pthread_mutex_unlock(&pager->serving_lock);
out:
	pthread_mutex_unlock(&pager->evict_lock);
	return result;
}

void kh_pager_free(struct kh_pager *pager)
{
	if (!pager)
		return;
	if (pager->stop_event >= 0)
		close(pager->stop_event);
	if (pager->failure_event >= 0)
		close(pager->failure_event);
	kh_huge_destroy(pager);
	kh_log_destroy(&pager->log);
	kh_store_destroy(&pager->store);
	free(pager->run_pages);
	free(pager->refused);
	free(pager->passed);
	free(pager->mixed);
	free(pager->swap_fake);
	free(pager->state);
	free(pager->resident);
	free(pager->pinned);
	free(pager->history);
	free(pager->victims);
	pthread_mutex_destroy(&pager->evict_lock);
	pthread_cond_destroy(&pager->thawed);
	pthread_mutex_destroy(&pager->serving_lock);
	pthread_cond_destroy(&pager->serving_changed);
	for (int i = 0; i < KH_STRIPES; i++)
		pthread_mutex_destroy(&pager->stripes[i]);
	free(pager);
}

/* ---- settings and queries -------------------------------------------- */

void kh_pager_set_store(struct kh_pager *pager, uint64_t limit_bytes, int refuse_raw)
{
	__atomic_store_n(&pager->store.slab.limit_bytes, limit_bytes, __ATOMIC_RELAXED);
	pager->store.refuse_raw = refuse_raw;
}

void kh_pager_set_prefetch(struct kh_pager *pager, uint32_t n_pages)
{
	__atomic_store_n(&pager->prefetch_pages, n_pages, __ATOMIC_RELAXED);
}

void kh_pager_set_memory_wait(struct kh_pager *pager, uint64_t ns)
{
	__atomic_store_n(&pager->memory_wait_ns, ns, __ATOMIC_RELAXED);
}

int kh_pager_lost_errno(struct kh_pager *pager)
{
	return __atomic_load_n(&pager->lost_errno, __ATOMIC_RELAXED);
}

void kh_pager_set_limit(struct kh_pager *pager, uint64_t resident_pages)
{
	/* After this no thread evicts for the old limit. */
	kh_pager_lock_unfrozen(pager);
	__atomic_store_n(&pager->limit_pages, resident_pages, __ATOMIC_RELAXED);
	kh_pager_new_round(pager);
	pthread_mutex_unlock(&pager->evict_lock);
}

uint64_t kh_pager_limit(struct kh_pager *pager)
{
	return __atomic_load_n(&pager->limit_pages, __ATOMIC_RELAXED);
}

int kh_pager_set_victims(struct kh_pager *pager, const uint32_t *index, uint64_t n)
{
	uint32_t *copy = malloc(n ? n * sizeof(*copy) : 1);

	if (!copy)
		return -ENOMEM;
	for (uint64_t i = 0; i < n; i++) {
		if (index[i] >= pager->n_pages) {
			free(copy);
			return -ERANGE;
		}
		copy[i] = index[i];
	}
	kh_pager_lock_unfrozen(pager);
	free(pager->victims);
	pager->victims = copy;
	pager->n_victims = n;
	pager->next_victim = 0;
	pthread_mutex_unlock(&pager->evict_lock);
	return 0;
}

int kh_pager_pin(struct kh_pager *pager, uint64_t index, uint64_t n_pages, int pinned)
{
	int result = 0;

	if (index > pager->n_pages || n_pages > pager->n_pages - index)
		return -ERANGE;
	for (uint64_t i = index; i < index + n_pages; i++) {
		kh_pager_lock_page(pager, i);
		if (pinned)
			result |= kh_pager_state_of(pager, i) == KH_PAGE_EVICTED;
		if (pinned)
			kh_bit_set(pager->pinned, i);
		else
			kh_bit_clear(pager->pinned, i);
		kh_pager_unlock_page(pager, i);
	}
	/* Pinned, but evicted: kh_pager_restore brings such pages in. */
	return result;
}

static int restore_page(struct kh_pager *pager, uint64_t index)
{
	const struct kh_pager_region *region = kh_pager_region_of(pager, index);
	uint64_t address = region->alias + (index - region->first) * KH_PAGE_BYTES;
	int result = -ENOENT;

	kh_pager_lock_page(pager, index);
	if (kh_pager_state_of(pager, index) == KH_PAGE_EVICTED)
		result = kh_pager_bring_back(pager, index, address, KH_EVENT_RESTORED);
	if (!result)
		COUNT(pager, restored_pages);
	kh_pager_unlock_page(pager, index);
	return result;
}

int kh_pager_restore(struct kh_pager *pager, uint64_t index, uint64_t n_pages,
		     struct kh_restore_result *result)
{
	*result = (struct kh_restore_result){ 0 };
	if (index > pager->n_pages || n_pages > pager->n_pages - index)
		return -ERANGE;
	for (uint64_t i = index; i < index + n_pages; i++) {
		if (kh_pager_state_of(pager, i) != KH_PAGE_EVICTED)
			continue;
		kh_pager_wait_thawed(pager);
		if (!restore_page(pager, i))
			result->restored++;
		else if (kh_pager_state_of(pager, i) == KH_PAGE_LOST)
			result->lost++;
		else if (kh_pager_state_of(pager, i) == KH_PAGE_EVICTED)
			result->left++;
	}
	kh_pager_tidy_all(pager);
	return 0;
}

int kh_pager_state(struct kh_pager *pager, uint64_t index, uint64_t n_pages, uint8_t *states)
{
	if (index > pager->n_pages || n_pages > pager->n_pages - index)
		return -ERANGE;
	for (uint64_t i = 0; i < n_pages; i++)
		states[i] = kh_pager_state_of(pager, index + i);
	return 0;
}

void kh_pager_counters(struct kh_pager *pager, struct kh_pager_counters *counters)
{
	const uint64_t *from = (const uint64_t *)&pager->counters;
	uint64_t *to = (uint64_t *)counters;

	for (uint64_t i = 0; i < sizeof(*counters) / sizeof(*to); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
	counters->store_bytes = __atomic_load_n(&pager->store.used_bytes, __ATOMIC_RELAXED);
	counters->store_held_bytes = __atomic_load_n(&pager->store.slab.chunk_bytes,
						     __ATOMIC_RELAXED);
	counters->same_filled_pages = __atomic_load_n(&pager->store.same_filled_pages,
						      __ATOMIC_RELAXED);
	counters->raw_pages = __atomic_load_n(&pager->store.raw_pages, __ATOMIC_RELAXED);
	counters->disk_full = __atomic_load_n(&pager->store.disk_full, __ATOMIC_RELAXED);
}

uint64_t kh_pager_stored_bytes(struct kh_pager *pager, uint64_t index)
{
	uint64_t n_bytes;

	if (index >= pager->n_pages)
		return 0;
	kh_pager_lock_page(pager, index);
	n_bytes = kh_store_bytes(&pager->store, index);
	kh_pager_unlock_page(pager, index);
	return n_bytes;
}

void kh_pager_inject(struct kh_pager *pager, const struct kh_injection *failures)
{
	__atomic_store_n(&pager->store.failing_stores, failures->stores, __ATOMIC_RELAXED);
	__atomic_store_n(&pager->store.failing_loads, failures->loads, __ATOMIC_RELAXED);
	__atomic_store_n(&pager->failing_fills, failures->fills, __ATOMIC_RELAXED);
	__atomic_store_n(&pager->failing_splits, failures->splits, __ATOMIC_RELAXED);
}

int kh_pager_fake_swap(struct kh_pager *pager, uint64_t index, uint64_t n_pages, int swapped)
{
	if (index > pager->n_pages || n_pages > pager->n_pages - index)
		return -ERANGE;
	pthread_mutex_lock(&pager->evict_lock);
	if (!pager->swap_fake)
		pager->swap_fake = calloc(pager->max_pages / 64 + 1, sizeof(uint64_t));
	for (uint64_t i = index; pager->swap_fake && i < index + n_pages; i++)
		if (swapped)
			kh_bit_set(pager->swap_fake, i);
		else
			kh_bit_clear(pager->swap_fake, i);
	pthread_mutex_unlock(&pager->evict_lock);
	return pager->swap_fake ? 0 : -ENOMEM;
}
