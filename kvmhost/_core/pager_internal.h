/*
 * The pager's own structures. pager.c has its life and its settings,
 * pager_evict.c how pages go, pager_fault.c how they come back.
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
/* In a page's history: young in the window that ended last. */
#define KH_HISTORY_NOW 0x80

struct kh_pager_region {
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
	struct kh_pager_region regions[KH_MAX_REGIONS];
	uint64_t n_pages;
	uint8_t *state;		/* KH_PAGE_* */
	uint8_t *pinned;
	uint8_t *history;	/* young in the last eight windows, the latest in bit 7 */
	pthread_mutex_t evict_lock;
	pthread_mutex_t stripes[KH_STRIPES];
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

/* Evict a few pages to stay under the limit; returns how many went. */
int64_t kh_pager_direct_evict(struct kh_pager *pager);
/* Copy an evicted page in at an address of either mapping. The caller holds its stripe. */
int kh_pager_bring_back(struct kh_pager *pager, uint64_t index, uint64_t address);

#endif
