/*
 * The pager's own structures. pager.c has setup, teardown and settings,
 * pager_evict.c eviction, pager_huge.c the splitting of huge pages before it,
 * pager_tidy.c the compaction of the store, pager_fault.c fault-in, pager_clock.c
 * victim selection, pager_log.c the log of events.
 */
#ifndef KVMHOST_PAGER_INTERNAL_H
#define KVMHOST_PAGER_INTERNAL_H

#include "pager.h"
#include "store_internal.h"

#include <pthread.h>

#define KH_MAX_REGIONS 8
#define KH_STRIPES 256
/* Pages that one eviction step holds locked; a fault on them waits that long. */
#define KH_RUN_PAGES 16
#define KH_HISTORY_WINDOWS 8
#define KH_MAX_PENDING 256
/* What one page of the kernel's page tables maps, and the largest folio of shared memory. */
#define KH_PIECE_BYTES (2ull << 20)
#define KH_PIECE_PAGES (KH_PIECE_BYTES / KH_PAGE_BYTES)

struct kh_pager_region {
	int memfd;
	uint64_t guest;
	uint64_t alias;
	uint64_t first;		/* index of the first page */
	uint64_t n_pages;
};

/*
 * The windows in which 64 pages were young: one word per window, the latest first.
 * One cache line, so that the clock hand takes 64 pages in a few steps.
 */
struct kh_history {
	uint64_t window[KH_HISTORY_WINDOWS];
};

/* A fault for which there was no memory. */
struct kh_pending {
	uint64_t address;
	uint64_t since_ns;
	uint64_t next_ns;	/* when it is tried again */
	uint64_t pause_ns;
};

struct kh_page_log {
	pthread_mutex_t lock;
	uint64_t *events;	/* a ring, as in kh_pager_read_log */
	uint64_t mask;
	uint64_t next;		/* number of the next event */
};

/*
 * Locks, outermost first: evict_lock (one evictor at a time, so that only one
 * thread ever holds several stripes), then a page's stripe, then the log's lock. The fault handler
 * takes one stripe at a time, and evict_lock only while it holds none. No lock
 * is held across anything that could fault on guest memory: pages are read with
 * pread, which returns zeros for a hole and instantiates nothing.
 */
struct kh_pager {
	int uffd;
	int stop_event;
	int failure_event;	/* readable once a fault could not be served */
	int armed;
	int serving;
	int stopping;
	int failure_errno;	/* of the first fault that could not be served; 0: none */
	pthread_mutex_t serving_lock;
	pthread_cond_t serving_changed;
	uint32_t n_regions;
	struct kh_pager_region regions[KH_MAX_REGIONS];
	uint64_t n_pages;	/* of the regions there are */
	uint64_t max_pages;
	uint8_t *state;		/* KH_PAGE_* */
	uint64_t *resident;	/* bitmap: state is KH_PAGE_RESIDENT */
	uint64_t *pinned;	/* bitmap */
	uint64_t *refused;	/* bitmap: did not compress, and stays write-protected since */
	uint64_t *passed;	/* bitmap: could not be evicted in this round of the clock hand */
	int space_freed;	/* since the last round: failed pages may be retried */
	uint64_t *mixed;	/* bitmap: pieces that may have folios of any size */
	uint64_t *swap_fake;	/* bitmap, for tests; or NULL */
	uint64_t scratch;	/* address space for one piece, and its alignment */
	uint64_t mapped_piece;	/* first page of the one there, plus 1 */
	int pipe[2];		/* holds a reference to a page of the piece that is worked on */
	int pagemap;
	char *run_pages;	/* contents of the run that is evicted */
	struct kh_history *history;
	pthread_mutex_t evict_lock;
	pthread_cond_t thawed;
	uint32_t frozen;	/* by snapshots under way, see chunk.h; under evict_lock */
	pthread_mutex_t stripes[KH_STRIPES];
	struct kh_store store;
	uint32_t *victims;
	uint64_t n_victims;
	uint64_t next_victim;
	uint64_t hand;
	uint32_t lap;		/* lap of the hand; no colder pages were found */
	uint32_t batch;		/* of the pages that are evicted now */
	uint64_t last_run;	/* first page of it, plus 1; its page tables are still there */
	uint32_t prefetch_pages;
	int lost_errno;
	uint64_t limit_pages;
	uint64_t memory_wait_ns;
	uint64_t failing_fills;
	uint64_t failing_splits;
	struct kh_pending pending[KH_MAX_PENDING];	/* of the thread that serves faults */
	uint32_t n_pending;
	uint32_t evicting;	/* KH_EVENT_EVICTED_*, of the pages that are evicted now */
	struct kh_page_log log;
	struct kh_pager_counters counters;
};

#define COUNT(pager, field) __atomic_fetch_add(&(pager)->counters.field, 1, __ATOMIC_RELAXED)
#define UNCOUNT(pager, field) __atomic_fetch_sub(&(pager)->counters.field, 1, __ATOMIC_RELAXED)

static inline int kh_pager_is_armed(const struct kh_pager *pager)
{
	return __atomic_load_n(&pager->armed, __ATOMIC_ACQUIRE);
}

static inline const struct kh_pager_region *kh_pager_region_of(const struct kh_pager *pager, uint64_t index)
{
	for (uint32_t i = 0; i < pager->n_regions; i++)
		if (index - pager->regions[i].first < pager->regions[i].n_pages)
			return &pager->regions[i];
	return NULL;
}

static inline void kh_pager_lock_page(struct kh_pager *pager, uint64_t index)
{
	pthread_mutex_lock(&pager->stripes[index % KH_STRIPES]);
}

static inline void kh_pager_unlock_page(struct kh_pager *pager, uint64_t index)
{
	pthread_mutex_unlock(&pager->stripes[index % KH_STRIPES]);
}

static inline void kh_bit_set(uint64_t *words, uint64_t bit)
{
	__atomic_fetch_or(&words[bit / 64], 1ull << (bit % 64), __ATOMIC_RELAXED);
}

static inline void kh_bit_clear(uint64_t *words, uint64_t bit)
{
	__atomic_fetch_and(&words[bit / 64], ~(1ull << (bit % 64)), __ATOMIC_RELAXED);
}

static inline int kh_bit(const uint64_t *words, uint64_t bit)
{
	return __atomic_load_n(&words[bit / 64], __ATOMIC_RELAXED) >> (bit % 64) & 1;
}

static inline uint8_t kh_pager_state_of(const struct kh_pager *pager, uint64_t index)
{
	return __atomic_load_n(&pager->state[index], __ATOMIC_ACQUIRE);
}

/* The counter of the pages in a state, or NULL. */
static inline uint64_t *kh_pager_gauge(struct kh_pager *pager, uint8_t state)
{
	switch (state) {
	case KH_PAGE_RESIDENT:
		return &pager->counters.resident_pages;
	case KH_PAGE_EVICTED:
	case KH_PAGE_LOST:
		return &pager->counters.evicted_pages;
	case KH_PAGE_SWAPPED:
		return &pager->counters.swapped_pages;
	}
	return NULL;
}

/* The caller holds the page's stripe. */
static inline void kh_pager_set_state(struct kh_pager *pager, uint64_t index, uint8_t state)
{
	uint64_t *from = kh_pager_gauge(pager, kh_pager_state_of(pager, index));
	uint64_t *to = kh_pager_gauge(pager, state);

	if (from != to && from)
		__atomic_fetch_sub(from, 1, __ATOMIC_RELAXED);
	if (from != to && to)
		__atomic_fetch_add(to, 1, __ATOMIC_RELAXED);
	__atomic_store_n(&pager->state[index], state, __ATOMIC_RELEASE);
	if (state == KH_PAGE_RESIDENT)
		kh_bit_set(pager->resident, index);
	else
		kh_bit_clear(pager->resident, index);
}

static inline void kh_pager_mark_young(struct kh_pager *pager, uint64_t index)
{
	__atomic_fetch_or(&pager->history[index / 64].window[0], 1ull << (index % 64),
			  __ATOMIC_RELAXED);
}

static inline int kh_pager_is_young(const struct kh_pager *pager, uint64_t index)
{
	return kh_bit(&pager->history[index / 64].window[0], index % 64);
}

/*
 * Take evict_lock for a caller of the API, once no snapshot freezes the pager. The
 * fault handler takes the lock directly and does not wait for a thaw.
 */
void kh_pager_lock_unfrozen(struct kh_pager *pager);
void kh_pager_wait_thawed(struct kh_pager *pager);
/*
 * Evict a few pages that the clock hand or the daemon chose; with *went, their
 * number. Returns the number of pages tried: 0 if there are no candidates left.
 */
uint64_t kh_pager_evict_some(struct kh_pager *pager, uint32_t event, uint64_t *went);
/* Retry the pages that could not be evicted. The caller holds evict_lock. */
void kh_pager_new_round(struct kh_pager *pager);
/* Whether there are more resident pages than the limit allows. */
int kh_pager_is_over(const struct kh_pager *pager);
/*
 * Check the pages found in swap: the kernel does not report a swap-in. The caller holds
 * evict_lock.
 */
void kh_pager_look_at_swapped(struct kh_pager *pager);
/* Write-protect pages of one region in both mappings, or remove the protection. */
int kh_pager_protect(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t first,
		     uint64_t n_pages, int protect);

/* Move a few records out of sparse chunks; whether there is more to do. Takes evict_lock. */
int kh_pager_tidy(struct kh_pager *pager);
void kh_pager_tidy_all(struct kh_pager *pager);
/* The same with evict_lock held, and no stripe. */
int kh_pager_tidy_locked(struct kh_pager *pager);

/* Allocate the state for detecting huge pages; called at arming. */
int kh_huge_init(struct kh_pager *pager, int split_all);
void kh_huge_destroy(struct kh_pager *pager);
/*
 * Ensure that the pages of one piece are not in a huge page, and that no huge page
 * forms before kh_huge_release. 0, or -errno: they must not be punched. The caller
 * holds evict_lock and no stripe.
 */
int kh_huge_hold(struct kh_pager *pager, const struct kh_pager_region *region, uint64_t first,
		 uint64_t n_pages);
void kh_huge_release(struct kh_pager *pager);
/* Next pages for the fault handler to evict; the caller holds evict_lock. */
uint64_t kh_pager_choose(struct kh_pager *pager, uint32_t *index, uint64_t n);
/* A page is evicted: clear its history. */
void kh_pager_forget_history(struct kh_pager *pager, uint64_t index);
/* Copy an evicted page in at an address of either mapping. The caller holds its stripe. */
int kh_pager_bring_back(struct kh_pager *pager, uint64_t index, uint64_t address, uint64_t event);
uint64_t kh_now_ns(void);

int kh_log_init(struct kh_page_log *log, uint64_t n_pages);
void kh_log_destroy(struct kh_page_log *log);
/* Add an event. The caller holds the page's stripe. */
void kh_pager_log(struct kh_pager *pager, uint64_t index, uint64_t event);

#endif
