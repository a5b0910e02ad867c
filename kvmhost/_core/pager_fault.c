/* Fault-in: the userfaultfd event loop and the handling of a fault. */
#include "pager_internal.h"

#include "uffd.h"

#include <poll.h>
#include <time.h>
#include <unistd.h>

#define MESSAGES 16
/* Batches that one fault at the limit tries to evict before it exceeds the limit. */
#define LIMIT_BATCHES 8
#define FIRST_PAUSE_NS 1000000ull
#define LONGEST_PAUSE_NS 100000000ull

/* Index of the page at a faulting address, in either mapping; -1 if in none. */
static int64_t index_at(const struct kh_pager *pager, uint64_t address)
{
	for (uint32_t i = 0; i < pager->n_regions; i++) {
		const struct kh_pager_region *region = &pager->regions[i];
		uint64_t n_bytes = region->n_pages * KH_PAGE_BYTES;

		if (address - region->guest < n_bytes)
			return region->first + (address - region->guest) / KH_PAGE_BYTES;
		if (address - region->alias < n_bytes)
			return region->first + (address - region->alias) / KH_PAGE_BYTES;
	}
	return -1;
}

uint64_t kh_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void count_latency(struct kh_pager *pager, uint64_t ns)
{
	int bucket = ns ? 63 - __builtin_clzll(ns) : 0;

	__atomic_fetch_add(&pager->counters.latency_sum_ns, ns, __ATOMIC_RELAXED);
	COUNT(pager, latency[bucket < KH_LATENCY_BUCKETS ? bucket : KH_LATENCY_BUCKETS - 1]);
}

static int has_room(struct kh_pager *pager)
{
	uint64_t limit = __atomic_load_n(&pager->limit_pages, __ATOMIC_RELAXED);

	return !limit || __atomic_load_n(&pager->counters.resident_pages, __ATOMIC_RELAXED) < limit;
}

/* Retry pages that could not be evicted, if a round tried all and the store has room again. */
static void end_round(struct kh_pager *pager)
{
	pthread_mutex_lock(&pager->evict_lock);
	if (__atomic_load_n(&pager->space_freed, __ATOMIC_RELAXED))
		kh_pager_new_round(pager);
	pthread_mutex_unlock(&pager->evict_lock);
}

static void hold_limit(struct kh_pager *pager)
{
	uint64_t tried, went;

	for (int batch = 0; batch < LIMIT_BATCHES && !has_room(pager); batch++) {
		tried = kh_pager_evict_some(pager, KH_EVENT_EVICTED_LIMIT, &went);
		__atomic_fetch_add(&pager->counters.direct_evictions, went, __ATOMIC_RELAXED);
		if (went)
			return;
		if (!tried) {
			end_round(pager);
			break;
		}
	}
	if (!has_room(pager))
		COUNT(pager, over_limit);
}

/* Fill a page without waking its waiters. */
static int fill(struct kh_pager *pager, uint64_t address, const void *page)
{
	if (kh_take_injected(&pager->failing_fills))
		return -ENOMEM;
	return page ? kh_uffd_copy(pager->uffd, address, page) : kh_uffd_zero(pager->uffd, address);
}

int kh_pager_bring_back(struct kh_pager *pager, uint64_t index, uint64_t address, uint64_t event)
{
	char page[KH_PAGE_BYTES] __attribute__((aligned(64)));
	int result = kh_store_get(&pager->store, index, page);

	if (result) {
		kh_pager_set_state(pager, index, KH_PAGE_LOST);
		__atomic_store_n(&pager->lost_errno, -result, __ATOMIC_RELAXED);
		COUNT(pager, lost_pages);
		return result;
	}
	result = fill(pager, address, page);
	if (result)
		return result;
	kh_store_drop(&pager->store, index);
	__atomic_store_n(&pager->space_freed, 1, __ATOMIC_RELAXED);
	kh_pager_set_state(pager, index, KH_PAGE_RESIDENT);
	kh_pager_log(pager, index, event);
	/* Last, so that the waiters find the state, the log and the counters updated. */
	return kh_uffd_wake(pager->uffd, address);
}

static int first_touch(struct kh_pager *pager, uint64_t index, uint64_t address)
{
	int result = fill(pager, address, NULL);

	/* In every previous state: the memfd now holds the page, in memory. */
	if (!result || result == -EEXIST)
		kh_pager_set_state(pager, index, KH_PAGE_RESIDENT);
	if (result == -EEXIST) {
		/*
		 * The memfd holds the page already, filled through the other mapping: map it and
		 * continue.
		 */
		COUNT(pager, wakes);
		return kh_uffd_wake(pager->uffd, address);
	}
	if (result)
		return result;
	kh_pager_mark_young(pager, index);
	COUNT(pager, zero_fills);
	return kh_uffd_wake(pager->uffd, address);
}

/*
 * Bring back the pages that were evicted with a page that is needed again, as far
 * as there is room. Through the alias: in the guest mapping such a page would look
 * touched.
 */
static void prefetch(struct kh_pager *pager, uint64_t index, int batch)
{
	const struct kh_pager_region *region = kh_pager_region_of(pager, index);
	uint64_t n_pages = __atomic_load_n(&pager->prefetch_pages, __ATOMIC_RELAXED);
	uint64_t end = region->first + region->n_pages;
	int more = 1;

	for (uint64_t i = index + 1; more && i < end && i <= index + n_pages && has_room(pager); i++) {
		uint64_t address = region->alias + (i - region->first) * KH_PAGE_BYTES;
		int other;

		kh_pager_lock_page(pager, i);
		other = kh_store_batch(&pager->store, i);
		more = kh_pager_state_of(pager, i) == KH_PAGE_EVICTED &&
		       (other == batch || other < 0 || batch < 0) &&
		       !kh_pager_bring_back(pager, i, address, KH_EVENT_RESTORED);
		if (more)
			COUNT(pager, prefetched_pages);
		kh_pager_unlock_page(pager, i);
	}
	/* Not young: without a touch they are the first to be evicted. */
	__atomic_store_n(&pager->lap, 0, __ATOMIC_RELAXED);
}

static int serve_evicted(struct kh_pager *pager, uint64_t index, uint64_t address, uint64_t start_ns)
{
	int result;

	kh_pager_mark_young(pager, index);
	/* Counted before the wakeup, so that the waiters find the counters updated. */
	COUNT(pager, fault_ins);
	result = kh_pager_bring_back(pager, index, address, KH_EVENT_REFAULTED);
	if (result)
		UNCOUNT(pager, fault_ins);
	else
		count_latency(pager, kh_now_ns() - start_ns);
	return result;
}

static int serve_missing(struct kh_pager *pager, uint64_t index, uint64_t address)
{
	uint64_t start_ns = kh_now_ns();
	int evicted, batch, result;

	hold_limit(pager);
	kh_pager_lock_page(pager, index);
	evicted = kh_pager_state_of(pager, index) == KH_PAGE_EVICTED;
	batch = evicted ? kh_store_batch(&pager->store, index) : -1;
	if (evicted)
		result = serve_evicted(pager, index, address, start_ns);
	else if (kh_pager_state_of(pager, index) == KH_PAGE_LOST)
		result = -EBADMSG;
	else
		result = first_touch(pager, index, address);
	kh_pager_unlock_page(pager, index);
	if (evicted && !result && __atomic_load_n(&pager->prefetch_pages, __ATOMIC_RELAXED))
		prefetch(pager, index, batch);
	return result;
}

/* A write hit the write protection of an eviction, which has ended by now. */
static int serve_wp(struct kh_pager *pager, uint64_t index, uint64_t address)
{
	int result;

	kh_pager_lock_page(pager, index);
	COUNT(pager, wp_faults);
	/* Written, it may compress. */
	kh_bit_clear(pager->refused, index);
	result = kh_uffd_write_protect(pager->uffd, address, KH_PAGE_BYTES, 0);
	kh_pager_unlock_page(pager, index);
	return result;
}

/*
 * A fault for which the host has no memory: evict cold pages to free some. This
 * does not end the VM; the fault is retried.
 */
static int make_memory(struct kh_pager *pager)
{
	uint64_t went;

	if (!kh_pager_evict_some(pager, KH_EVENT_EVICTED_MEMORY, &went))
		end_round(pager);
	__atomic_fetch_add(&pager->counters.memory_evictions, went, __ATOMIC_RELAXED);
	return went > 0;
}

static int serve_missing_or_make_memory(struct kh_pager *pager, uint64_t index, uint64_t address)
{
	int result = serve_missing(pager, index, address);

	if (result == -ENOMEM && make_memory(pager))
		result = serve_missing(pager, index, address);
	return result;
}

/* Try a fault again later; there is room, otherwise no message would have been read. */
static void keep_pending(struct kh_pager *pager, uint64_t address)
{
	uint64_t now = kh_now_ns();

	COUNT(pager, memory_waits);
	pager->pending[pager->n_pending++] = (struct kh_pending){ address, now, now + FIRST_PAUSE_NS,
								  FIRST_PAUSE_NS };
	__atomic_store_n(&pager->counters.pending_faults, pager->n_pending, __ATOMIC_RELAXED);
}

static int serve_message(struct kh_pager *pager, const struct uffd_msg *message)
{
	uint64_t address = message->arg.pagefault.address & ~(KH_PAGE_BYTES - 1ull);
	int64_t index = index_at(pager, address);
	int result;

	if (message->event != UFFD_EVENT_PAGEFAULT || index < 0)
		return 0;
	if (message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP)
		return serve_wp(pager, index, address);
	result = serve_missing_or_make_memory(pager, index, address);
	if (result == -ENOMEM) {
		keep_pending(pager, address);
		return 0;
	}
	return result;
}

static void raise_event(int event)
{
	uint64_t one = 1;

	/* The counter is 64 bits wide: the write never blocks. */
	while (write(event, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

/* Wakes kh_pager_wait_failure. The thread that serves faults must not wait for anyone. */
static void report_failure(struct kh_pager *pager, int error)
{
	int none = 0;

	if (__atomic_compare_exchange_n(&pager->failure_errno, &none, -error, 0, __ATOMIC_RELEASE,
					__ATOMIC_RELAXED))
		raise_event(pager->failure_event);
}

static int is_alias(const struct kh_pager *pager, uint64_t address)
{
	for (uint32_t i = 0; i < pager->n_regions; i++)
		if (address - pager->regions[i].alias < pager->regions[i].n_pages * KH_PAGE_BYTES)
			return 1;
	return 0;
}

/*
 * A fault that cannot be served. A guest thread may wait: a kick gets it out. A
 * thread of the VMM may hold the interpreter lock, and then every thread would wait
 * for it: SIGBUS is better than that, or than invalid data.
 */
static void give_up(struct kh_pager *pager, uint64_t address, int error)
{
	/* The mapping is being removed; no thread waits there. */
	if (error == -ENOENT || error == -ESRCH)
		return;
	COUNT(pager, errors);
	if (is_alias(pager, address))
		kh_uffd_poison(pager->uffd, address);
	report_failure(pager, error);
}

static int read_messages(struct kh_pager *pager)
{
	struct uffd_msg messages[MESSAGES];
	ssize_t got = read(pager->uffd, messages, sizeof(messages));

	if (got < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	for (uint64_t i = 0; i < got / sizeof(*messages); i++) {
		int result = serve_message(pager, &messages[i]);

		if (result)
			give_up(pager, messages[i].arg.pagefault.address & ~(KH_PAGE_BYTES - 1ull),
				result);
	}
	return 0;
}

/* Retry one pending fault; returns true if it is no longer pending. */
static int retry(struct kh_pager *pager, struct kh_pending *fault)
{
	uint64_t wait_ns = __atomic_load_n(&pager->memory_wait_ns, __ATOMIC_RELAXED);
	uint64_t index = index_at(pager, fault->address);
	int result = serve_missing_or_make_memory(pager, index, fault->address);

	if (result == -ENOMEM && kh_now_ns() - fault->since_ns < wait_ns) {
		fault->pause_ns = fault->pause_ns * 2 < LONGEST_PAUSE_NS ? fault->pause_ns * 2
									 : LONGEST_PAUSE_NS;
		fault->next_ns = kh_now_ns() + fault->pause_ns;
		return 0;
	}
	if (result)
		give_up(pager, fault->address, result);
	return 1;
}

/* Returns the ms until the next retry, or -1 if no fault is pending. */
static int retry_pending(struct kh_pager *pager)
{
	uint64_t next_ns = UINT64_MAX, now = kh_now_ns();

	for (uint32_t i = 0; i < pager->n_pending;) {
		if (now >= pager->pending[i].next_ns && retry(pager, &pager->pending[i])) {
			pager->pending[i] = pager->pending[--pager->n_pending];
			continue;
		}
		if (pager->pending[i].next_ns < next_ns)
			next_ns = pager->pending[i].next_ns;
		i++;
	}
	__atomic_store_n(&pager->counters.pending_faults, pager->n_pending, __ATOMIC_RELAXED);
	if (!pager->n_pending)
		return -1;
	now = kh_now_ns();
	return now < next_ns ? (next_ns - now) / 1000000 + 1 : 0;
}

static int serve_until_stop(struct kh_pager *pager)
{
	for (;;) {
		int pause_ms = pager->n_pending ? retry_pending(pager) : -1, result;
		/* Between faults: the store frees its empty chunks. */
		int untidy = kh_pager_tidy(pager);
		/* Faults that cannot be queued stay in the userfaultfd. */
		struct pollfd wait[2] = {
			{ .fd = pager->stop_event, .events = POLLIN },
			{ .fd = pager->n_pending + MESSAGES <= KH_MAX_PENDING ? pager->uffd : -1,
			  .events = POLLIN },
		};

		if (poll(wait, 2, untidy ? 0 : pause_ms) < 0 && errno != EINTR)
			return -errno;
		if (wait[0].revents)
			return 0;
		if (!wait[1].revents)
			continue;
		if (wait[1].revents & (POLLERR | POLLNVAL))
			return -EIO;
		result = read_messages(pager);
		if (result)
			return result;
	}
}

int kh_pager_serve(struct kh_pager *pager)
{
	int result;

	pthread_mutex_lock(&pager->serving_lock);
	pager->serving = 1;
	pthread_cond_broadcast(&pager->serving_changed);
	while (!kh_pager_is_armed(pager) && !pager->stopping)
		pthread_cond_wait(&pager->serving_changed, &pager->serving_lock);
	pthread_mutex_unlock(&pager->serving_lock);
	result = serve_until_stop(pager);
	if (result)
		report_failure(pager, result);
	return result;
}

int kh_pager_wait_failure(struct kh_pager *pager)
{
	struct pollfd wait[2] = {
		{ .fd = pager->failure_event, .events = POLLIN },
		{ .fd = pager->stop_event, .events = POLLIN },
	};

	while (poll(wait, 2, -1) < 0)
		if (errno != EINTR)
			return errno;
	return wait[0].revents ? __atomic_load_n(&pager->failure_errno, __ATOMIC_ACQUIRE) : 0;
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
	pthread_mutex_lock(&pager->serving_lock);
	pager->stopping = 1;
	pthread_cond_broadcast(&pager->serving_changed);
	pthread_mutex_unlock(&pager->serving_lock);
	raise_event(pager->stop_event);
}
