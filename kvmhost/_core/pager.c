#include "pager.h"

#include "hostmem.h"
#include "store_internal.h"
#include "uffd.h"

#include <fcntl.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define MAX_REGIONS 8
#define STRIPES 256
/* Pages that one eviction step holds locked; a fault on them waits that long. */
#define RUN_PAGES 16
#define MESSAGES 16
#define ENOMEM_TRIES 8
#define HISTORY_NOW 0x80

struct region {
	int memfd;
	uint64_t guest;
	uint64_t alias;
	uint64_t first;		/* index of the first page */
	uint64_t n_pages;
};

/*
 * Locks, outermost first: evict_lock (one evictor at a time, so that only one
 * thread ever holds several stripes), then a page's stripe. The fault handler
 * takes one stripe at a time, and evict_lock only while it holds none. No lock
 * is held across anything that could fault on guest memory: pages are read with
 * pread, which returns zeros for a hole and instantiates nothing.
 */
struct kh_pager {
	int uffd;
	int stop_event;
	int armed;
	int serving;
	int stopping;
	int failed;		/* serve() has reported a failure once */
	pthread_mutex_t serving_lock;
	pthread_cond_t serving_changed;
	uint32_t n_regions;
	struct region regions[MAX_REGIONS];
	uint64_t n_pages;
	uint8_t *state;		/* KH_PAGE_* */
	uint8_t *pinned;
	uint8_t *history;	/* young in the last eight windows, the latest in bit 7 */
	pthread_mutex_t evict_lock;
	pthread_mutex_t stripes[STRIPES];
	struct kh_store store;
	uint32_t *victims;
	uint64_t n_victims;
	uint64_t next_victim;
	uint64_t hand;
	uint64_t limit_pages;
	struct kh_pager_counters counters;
};

#define COUNT(pager, field) __atomic_fetch_add(&(pager)->counters.field, 1, __ATOMIC_RELAXED)
#define UNCOUNT(pager, field) __atomic_fetch_sub(&(pager)->counters.field, 1, __ATOMIC_RELAXED)

struct kh_pager *kh_pager_new(int uffd, kh_compress_fn compress, kh_decompress_fn decompress)
{
	struct kh_pager *pager = calloc(1, sizeof(*pager));

	if (!pager)
		return NULL;
	/*
	 * Pages are stored by one thread and dropped by another, over and over.
	 * With an arena a thread that fragments without end; one serves well.
	 */
	mallopt(M_ARENA_MAX, 1);
	pager->uffd = uffd;
	pager->stop_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (pager->stop_event < 0) {
		free(pager);
		return NULL;
	}
	pager->store.compress = compress;
	pager->store.decompress = decompress;
	pthread_mutex_init(&pager->evict_lock, NULL);
	pthread_mutex_init(&pager->serving_lock, NULL);
	pthread_cond_init(&pager->serving_changed, NULL);
	for (int i = 0; i < STRIPES; i++)
		pthread_mutex_init(&pager->stripes[i], NULL);
	return pager;
}

int64_t kh_pager_add_region(struct kh_pager *pager, int memfd, uint64_t guest, uint64_t alias,
			    uint64_t n_pages)
{
	uint64_t total = pager->n_pages + n_pages, first = pager->n_pages;
	int result;

	if (pager->armed)
		return -EBUSY;
	if (pager->n_regions == MAX_REGIONS)
		return -ENOSPC;
	result = kh_store_grow(&pager->store, total);
	if (result)
		return result;
	free(pager->state);
	free(pager->pinned);
	free(pager->history);
	pager->state = calloc(total, 1);
	pager->pinned = calloc(total, 1);
	pager->history = calloc(total, 1);
	if (!pager->state || !pager->pinned || !pager->history)
		return -ENOMEM;
	pager->regions[pager->n_regions++] = (struct region){ memfd, guest, alias, first, n_pages };
	pager->n_pages = total;
	return first;
}

/* Find out which pages of a region exist; from here on the fault handler knows. */
static int take_stock(struct kh_pager *pager, const struct region *region)
{
	uint64_t n_words = (region->n_pages + 63) / 64;
	uint64_t *words = calloc(n_words, sizeof(*words));
	int result;

	if (!words)
		return -ENOMEM;
	result = kh_resident(region->alias, region->n_pages, words);
	for (uint64_t i = 0; !result && i < region->n_pages; i++) {
		int resident = words[i / 64] >> (i % 64) & 1;

		pager->state[region->first + i] = resident ? KH_PAGE_RESIDENT : KH_PAGE_FRESH;
		pager->counters.resident_pages += resident;
	}
	free(words);
	return result;
}

int kh_pager_arm(struct kh_pager *pager)
{
	int result = 0;

	if (pager->armed)
		return 0;
	/* Faults that come from here on wait until serve() sees that all is armed. */
	for (uint32_t i = 0; !result && i < pager->n_regions; i++) {
		const struct region *region = &pager->regions[i];
		uint64_t n_bytes = region->n_pages * KH_PAGE_BYTES;
		int modes = KH_UFFD_MISSING | KH_UFFD_WP;

		result = kh_uffd_register(pager->uffd, region->guest, n_bytes, modes);

		if (!result)
			result = kh_uffd_register(pager->uffd, region->alias, n_bytes, modes);
		if (!result)
			result = take_stock(pager, region);
	}
	pthread_mutex_lock(&pager->serving_lock);
	pager->armed = !result;
	pthread_cond_broadcast(&pager->serving_changed);
	pthread_mutex_unlock(&pager->serving_lock);
	return result;
}

static const struct region *region_of(const struct kh_pager *pager, uint64_t index)
{
	for (uint32_t i = 0; i < pager->n_regions; i++)
		if (index - pager->regions[i].first < pager->regions[i].n_pages)
			return &pager->regions[i];
	return NULL;
}

/* Index of the page at a faulting address, in either mapping; -1 if in none. */
static int64_t index_at(const struct kh_pager *pager, uint64_t address)
{
	for (uint32_t i = 0; i < pager->n_regions; i++) {
		const struct region *region = &pager->regions[i];
		uint64_t n_bytes = region->n_pages * KH_PAGE_BYTES;

		if (address - region->guest < n_bytes)
			return region->first + (address - region->guest) / KH_PAGE_BYTES;
		if (address - region->alias < n_bytes)
			return region->first + (address - region->alias) / KH_PAGE_BYTES;
	}
	return -1;
}

static void lock_page(struct kh_pager *pager, uint64_t index)
{
	pthread_mutex_lock(&pager->stripes[index % STRIPES]);
}

static void unlock_page(struct kh_pager *pager, uint64_t index)
{
	pthread_mutex_unlock(&pager->stripes[index % STRIPES]);
}

/* ---- eviction ---------------------------------------------------------- */

static int protect_run(struct kh_pager *pager, const struct region *region, uint64_t first,
		       uint64_t n_pages, int protect)
{
	uint64_t offset = (first - region->first) * KH_PAGE_BYTES, n_bytes = n_pages * KH_PAGE_BYTES;
	int guest = kh_uffd_write_protect(pager->uffd, region->guest + offset, n_bytes, protect);
	int alias = kh_uffd_write_protect(pager->uffd, region->alias + offset, n_bytes, protect);

	return guest ? guest : alias;
}

static int punch(const struct region *region, uint64_t first, uint64_t n_pages)
{
	off_t offset = (first - region->first) * KH_PAGE_BYTES;

	return fallocate(region->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset,
			 n_pages * KH_PAGE_BYTES) ? -errno : 0;
}

static int store_page(struct kh_pager *pager, const struct region *region, uint64_t index)
{
	char page[KH_PAGE_BYTES] __attribute__((aligned(64)));
	off_t offset = (index - region->first) * KH_PAGE_BYTES;

	if (pread(region->memfd, page, sizeof(page), offset) != sizeof(page))
		return KH_EVICT_ERROR;
	return kh_store_put(&pager->store, index, page);
}

/* Punch the pages of a run that are in the store; cancel where that fails. */
static void commit_run(struct kh_pager *pager, const struct region *region, uint64_t first,
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

static void sort_out(struct kh_pager *pager, const struct region *region, uint64_t first,
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
 * Evict up to RUN_PAGES neighbours. A write that comes in between meets the
 * write protection, sends a message, and its handler waits for the stripe: it
 * then finds the page evicted (and faults it in) or still there.
 */
static void evict_run(struct kh_pager *pager, uint64_t first, uint64_t n_pages, uint8_t *outcome)
{
	const struct region *region = region_of(pager, first);
	uint64_t wanted = 0;

	for (uint64_t i = 0; i < n_pages; i++)
		lock_page(pager, first + i);
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
		unlock_page(pager, first + i);
	for (uint64_t i = 0; i < n_pages; i++) {
		COUNT(pager, outcomes[outcome[i]]);
		if (outcome[i] == KH_EVICT_ERROR)
			COUNT(pager, errors);
	}
}

/* Neighbours at index[0], index[0] + 1, ... within one region. */
static uint64_t run_length(const struct kh_pager *pager, const uint32_t *index, uint64_t n)
{
	const struct region *region = region_of(pager, index[0]);
	uint64_t length = 1, room = region->first + region->n_pages - index[0];

	while (length < n && length < RUN_PAGES && length < room &&
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
	for (uint64_t i = 0; i < n; i += RUN_PAGES) {
		uint64_t piece = n - i < RUN_PAGES ? n - i : RUN_PAGES;

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
		    !(pager->history[page] & HISTORY_NOW))
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

static int64_t direct_evict(struct kh_pager *pager)
{
	uint32_t index[RUN_PAGES];
	uint8_t outcome[RUN_PAGES];
	int64_t done = 0;

	pthread_mutex_lock(&pager->evict_lock);
	done = evict_locked(pager, index, choose_victims(pager, index, RUN_PAGES), outcome);
	pthread_mutex_unlock(&pager->evict_lock);
	__atomic_fetch_add(&pager->counters.direct_evictions, done, __ATOMIC_RELAXED);
	return done;
}

/* ---- faults ------------------------------------------------------------ */

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void count_latency(struct kh_pager *pager, uint64_t ns)
{
	int bucket = ns ? 63 - __builtin_clzll(ns) : 0;

	COUNT(pager, latency[bucket < KH_LATENCY_BUCKETS ? bucket : KH_LATENCY_BUCKETS - 1]);
}

static void hold_limit(struct kh_pager *pager)
{
	uint64_t limit = __atomic_load_n(&pager->limit_pages, __ATOMIC_RELAXED);

	if (!limit || __atomic_load_n(&pager->counters.resident_pages, __ATOMIC_RELAXED) < limit)
		return;
	if (!direct_evict(pager))
		COUNT(pager, over_limit);
}

/* Fill a page, making room where the host's memory limit refuses it. */
static int fill(struct kh_pager *pager, uint64_t address, const void *page)
{
	int result = -ENOMEM;

	for (int tries = 0; result == -ENOMEM && tries < ENOMEM_TRIES; tries++) {
		result = page ? kh_uffd_copy(pager->uffd, address, page)
			      : kh_uffd_zero(pager->uffd, address);
	}
	return result;
}

static int bring_back(struct kh_pager *pager, uint64_t index, uint64_t address)
{
	char page[KH_PAGE_BYTES] __attribute__((aligned(64)));
	int result = kh_store_get(&pager->store, index, page);

	if (result) {
		pager->state[index] = KH_PAGE_LOST;
		COUNT(pager, lost_pages);
		return result;
	}
	result = fill(pager, address, page);
	if (result)
		return result;
	kh_store_drop(&pager->store, index);
	pager->history[index] |= HISTORY_NOW;
	__atomic_store_n(&pager->state[index], KH_PAGE_RESIDENT, __ATOMIC_RELEASE);
	COUNT(pager, fault_ins);
	COUNT(pager, resident_pages);
	UNCOUNT(pager, evicted_pages);
	return 0;
}

static int first_touch(struct kh_pager *pager, uint64_t index, uint64_t address)
{
	int result = fill(pager, address, NULL);

	if (!result || result == -EEXIST)
		__atomic_store_n(&pager->state[index], KH_PAGE_RESIDENT, __ATOMIC_RELEASE);
	if (result == -EEXIST) {
		/* There already, put in through the other mapping: map it and go on. */
		COUNT(pager, wakes);
		return kh_uffd_wake(pager->uffd, address);
	}
	if (!result) {
		COUNT(pager, zero_fills);
		COUNT(pager, resident_pages);
	}
	return result;
}

static int serve_missing(struct kh_pager *pager, uint64_t index, uint64_t address)
{
	int result;

	hold_limit(pager);
	lock_page(pager, index);
	if (pager->state[index] == KH_PAGE_EVICTED)
		result = bring_back(pager, index, address);
	else if (pager->state[index] == KH_PAGE_LOST)
		result = -EBADMSG;
	else
		result = first_touch(pager, index, address);
	unlock_page(pager, index);
	return result;
}

/* A write met the protection of an eviction. By now the eviction is over. */
static int serve_wp(struct kh_pager *pager, uint64_t index, uint64_t address)
{
	int result;

	lock_page(pager, index);
	COUNT(pager, wp_faults);
	result = kh_uffd_write_protect(pager->uffd, address, KH_PAGE_BYTES, 0);
	unlock_page(pager, index);
	return result;
}

static int serve_message(struct kh_pager *pager, const struct uffd_msg *message)
{
	uint64_t address = message->arg.pagefault.address & ~(KH_PAGE_BYTES - 1ull);
	int64_t index = index_at(pager, address);
	uint64_t start_ns = now_ns();
	int result;

	if (message->event != UFFD_EVENT_PAGEFAULT || index < 0)
		return 0;
	if (message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP)
		return serve_wp(pager, index, address);
	result = serve_missing(pager, index, address);
	if (!result)
		count_latency(pager, now_ns() - start_ns);
	return result;
}

static int is_alias(const struct kh_pager *pager, uint64_t address)
{
	for (uint32_t i = 0; i < pager->n_regions; i++)
		if (address - pager->regions[i].alias < pager->regions[i].n_pages * KH_PAGE_BYTES)
			return 1;
	return 0;
}

/*
 * A fault that cannot be served. A guest thread may wait: a kick gets it out.
 * A thread of the VMM may hold the interpreter lock, and everything would wait
 * for it: better SIGBUS than that, or than made-up data.
 */
static int give_up(struct kh_pager *pager, const struct uffd_msg *message, int error)
{
	uint64_t address = message->arg.pagefault.address & ~(KH_PAGE_BYTES - 1ull);
	int first = !pager->failed;

	pager->failed = 1;
	COUNT(pager, errors);
	if (is_alias(pager, address))
		kh_uffd_poison(pager->uffd, address);
	return first ? error : 0;
}

static int read_messages(struct kh_pager *pager)
{
	struct uffd_msg messages[MESSAGES];
	ssize_t got = read(pager->uffd, messages, sizeof(messages));
	int failure = 0;

	if (got < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	for (uint64_t i = 0; i < got / sizeof(*messages); i++) {
		int result = serve_message(pager, &messages[i]);

		/* ENOENT: the mapping is on its way out; nobody waits there any more. */
		if (result && result != -ENOENT && result != -ESRCH)
			result = give_up(pager, &messages[i], result);
		failure = failure ? failure : result == -ENOENT || result == -ESRCH ? 0 : result;
	}
	return failure;
}

int kh_pager_serve(struct kh_pager *pager)
{
	struct pollfd wait[2] = {
		{ .fd = pager->uffd, .events = POLLIN },
		{ .fd = pager->stop_event, .events = POLLIN },
	};

	pthread_mutex_lock(&pager->serving_lock);
	pager->serving = 1;
	pthread_cond_broadcast(&pager->serving_changed);
	while (!pager->armed && !pager->stopping)
		pthread_cond_wait(&pager->serving_changed, &pager->serving_lock);
	pthread_mutex_unlock(&pager->serving_lock);
	for (;;) {
		int result;

		if (poll(wait, 2, -1) < 0 && errno != EINTR)
			return -errno;
		if (wait[1].revents)
			return 0;
		if (!wait[0].revents)
			continue;
		if (wait[0].revents & (POLLERR | POLLNVAL))
			return -EIO;
		result = read_messages(pager);
		if (result)
			return result;
	}
}

void kh_pager_wait_serving(struct kh_pager *pager)
{
	pthread_mutex_lock(&pager->serving_lock);
	while (!pager->serving)
		pthread_cond_wait(&pager->serving_changed, &pager->serving_lock);
	pthread_mutex_unlock(&pager->serving_lock);
}

void kh_pager_stop(struct kh_pager *pager)
{
	uint64_t one = 1;

	pthread_mutex_lock(&pager->serving_lock);
	pager->stopping = 1;
	pthread_cond_broadcast(&pager->serving_changed);
	pthread_mutex_unlock(&pager->serving_lock);
	while (write(pager->stop_event, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

void kh_pager_free(struct kh_pager *pager)
{
	if (!pager)
		return;
	close(pager->stop_event);
	kh_store_destroy(&pager->store, pager->n_pages);
	free(pager->state);
	free(pager->pinned);
	free(pager->history);
	free(pager->victims);
	pthread_mutex_destroy(&pager->evict_lock);
	pthread_mutex_destroy(&pager->serving_lock);
	pthread_cond_destroy(&pager->serving_changed);
	for (int i = 0; i < STRIPES; i++)
		pthread_mutex_destroy(&pager->stripes[i]);
	free(pager);
}

/* ---- settings and questions -------------------------------------------- */

void kh_pager_set_store(struct kh_pager *pager, uint64_t limit_bytes, int refuse_raw)
{
	__atomic_store_n(&pager->store.limit_bytes, limit_bytes, __ATOMIC_RELAXED);
	pager->store.refuse_raw = refuse_raw;
}

void kh_pager_set_limit(struct kh_pager *pager, uint64_t resident_pages)
{
	__atomic_store_n(&pager->limit_pages, resident_pages, __ATOMIC_RELAXED);
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
	pthread_mutex_lock(&pager->evict_lock);
	free(pager->victims);
	pager->victims = copy;
	pager->n_victims = n;
	pager->next_victim = 0;
	pthread_mutex_unlock(&pager->evict_lock);
	return 0;
}

int kh_pager_note_young(struct kh_pager *pager, uint64_t index, uint64_t n_pages,
			const uint64_t *words)
{
	if (index > pager->n_pages || n_pages > pager->n_pages - index)
		return -ERANGE;
	/* Races with a fault-in lose a bit of history at most. */
	for (uint64_t i = 0; i < n_pages; i++) {
		uint8_t young = words[i / 64] >> (i % 64) & 1 ? HISTORY_NOW : 0;

		pager->history[index + i] = pager->history[index + i] >> 1 | young;
	}
	return 0;
}

int kh_pager_pin(struct kh_pager *pager, uint64_t index, uint64_t n_pages, int pinned)
{
	int result = 0;

	if (index > pager->n_pages || n_pages > pager->n_pages - index)
		return -ERANGE;
	for (uint64_t i = index; i < index + n_pages; i++) {
		lock_page(pager, i);
		if (pinned)
			result |= pager->state[i] == KH_PAGE_EVICTED;
		pager->pinned[i] = pinned;
		unlock_page(pager, i);
	}
	/* Pinned, but out: kh_pager_restore brings such pages in. */
	return result;
}

int64_t kh_pager_restore(struct kh_pager *pager, uint64_t index, uint64_t n_pages)
{
	int64_t done = 0;

	if (index > pager->n_pages || n_pages > pager->n_pages - index)
		return -ERANGE;
	for (uint64_t i = index; i < index + n_pages; i++) {
		const struct region *region = region_of(pager, i);
		uint64_t address = region->alias + (i - region->first) * KH_PAGE_BYTES;
		int result = 0;

		lock_page(pager, i);
		if (pager->state[i] == KH_PAGE_EVICTED) {
			result = bring_back(pager, i, address);
			done += !result;
		}
		unlock_page(pager, i);
		if (result)
			return result;
	}
	return done;
}

int kh_pager_state(struct kh_pager *pager, uint64_t index, uint64_t n_pages, uint8_t *states)
{
	if (index > pager->n_pages || n_pages > pager->n_pages - index)
		return -ERANGE;
	memcpy(states, pager->state + index, n_pages);
	return 0;
}

void kh_pager_counters(struct kh_pager *pager, struct kh_pager_counters *counters)
{
	const uint64_t *from = (const uint64_t *)&pager->counters;
	uint64_t *to = (uint64_t *)counters;

	for (uint64_t i = 0; i < sizeof(*counters) / sizeof(*to); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
	counters->store_bytes = __atomic_load_n(&pager->store.used_bytes, __ATOMIC_RELAXED);
	counters->same_filled_pages = __atomic_load_n(&pager->store.same_filled_pages,
						      __ATOMIC_RELAXED);
	counters->raw_pages = __atomic_load_n(&pager->store.raw_pages, __ATOMIC_RELAXED);
}

uint64_t kh_pager_stored_bytes(struct kh_pager *pager, uint64_t index)
{
	uint64_t n_bytes = 0;

	if (index >= pager->n_pages)
		return 0;
	lock_page(pager, index);
	if (pager->store.n_bytes[index] == KH_SAME_FILLED)
		n_bytes = sizeof(uint64_t);
	else
		n_bytes = pager->store.n_bytes[index];
	unlock_page(pager, index);
	return n_bytes;
}

void kh_pager_inject(struct kh_pager *pager, uint64_t failing_stores, uint64_t failing_loads)
{
	__atomic_store_n(&pager->store.failing_stores, failing_stores, __ATOMIC_RELAXED);
	__atomic_store_n(&pager->store.failing_loads, failing_loads, __ATOMIC_RELAXED);
}
