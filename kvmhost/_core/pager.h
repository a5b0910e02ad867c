/*
 * Eviction and fault-in. The pager owns the evicted pages of one VM: it copies
 * a page out of the memfd, compresses it, punches it out, and brings it back
 * when a missing fault arrives through userfaultfd.
 *
 * Pages are numbered 0 .. n_pages - 1 over all regions, in the order in which
 * the regions were added ("index"). Both mappings of a region are registered:
 * a touch of an evicted page through either one brings it back.
 */
#ifndef KVMHOST_PAGER_H
#define KVMHOST_PAGER_H

#include "compat.h"

#define KH_PAGE_RESIDENT 0	/* in the memfd; before arming, or never touched */
#define KH_PAGE_EVICTED 1	/* only in the store */
#define KH_PAGE_LOST 2		/* the store could not give it back: the VM must stop */
#define KH_PAGE_FRESH 3		/* never touched: in neither */

/* Outcome of one eviction. */
#define KH_EVICT_DONE 0
#define KH_EVICT_PINNED 1	/* never evicted */
#define KH_EVICT_ABSENT 2	/* nothing there: evicted already, or never touched */
#define KH_EVICT_FULL 3		/* the store's limit is reached */
#define KH_EVICT_REFUSED 4	/* does not compress, and policy keeps such pages */
#define KH_EVICT_ERROR 5	/* a system call or the codec failed */
#define KH_EVICT_OUTCOMES 6

#define KH_LATENCY_BUCKETS 40	/* bucket b: [2^b, 2^(b+1)) ns */

typedef int (*kh_compress_fn)(const char *source, char *target, int source_bytes,
			      int target_bytes, int acceleration);
typedef int (*kh_decompress_fn)(const char *source, char *target, int source_bytes,
				int target_bytes);

struct kh_pager_counters {
	uint64_t resident_pages;	/* pages in the memfds, exact once armed */
	uint64_t evicted_pages;		/* pages in the store now */
	uint64_t same_filled_pages;	/* of these, kept as one word */
	uint64_t raw_pages;		/* of these, kept uncompressed */
	uint64_t store_bytes;		/* used by page contents in the store */
	uint64_t store_held_bytes;	/* taken from the system for them */
	uint64_t evictions;
	uint64_t direct_evictions;	/* of these, made by the fault handler at the limit */
	uint64_t fault_ins;
	uint64_t zero_fills;		/* first touches of a page while armed */
	uint64_t wp_faults;		/* writes that met an eviction */
	uint64_t wakes;			/* faults that found their page back */
	uint64_t over_limit;		/* faults served above the limit, nothing to evict */
	uint64_t errors;
	uint64_t lost_pages;
	uint64_t outcomes[KH_EVICT_OUTCOMES];
	uint64_t latency_sum_ns;	/* handling time of all fault-ins together */
	uint64_t latency[KH_LATENCY_BUCKETS];	/* fault-ins by handling time; their number is the sum */
};

struct kh_pager;

/* uffd: an open userfaultfd after UFFDIO_API. NULL if memory is short. */
struct kh_pager *kh_pager_new(int uffd, kh_compress_fn compress, kh_decompress_fn decompress);
/* Add a region before arming; returns the index of its first page or -errno. */
int64_t kh_pager_add_region(struct kh_pager *pager, int memfd, uint64_t guest, uint64_t alias,
			    uint64_t n_pages);
/* Register both mappings for missing and write-protect faults. */
int kh_pager_arm(struct kh_pager *pager);
/*
 * Serve faults until kh_pager_stop; 0, or -errno if a page cannot be brought
 * back. Called again after that, it serves what it can: guest threads that wait
 * for a page that is lost wait on, the VMM's own touch of it is SIGBUS.
 */
int kh_pager_serve(struct kh_pager *pager);
/* Wait until a thread is inside kh_pager_serve. */
void kh_pager_wait_serving(struct kh_pager *pager);
void kh_pager_stop(struct kh_pager *pager);
void kh_pager_free(struct kh_pager *pager);

/* Store limit in bytes (0: none); what to do with pages that do not compress. */
void kh_pager_set_store(struct kh_pager *pager, uint64_t limit_bytes, int refuse_raw);
/* Resident limit in pages (0: none), held by the fault handler itself. */
void kh_pager_set_limit(struct kh_pager *pager, uint64_t resident_pages);
/* Evict, as the fault handler would, until the limit holds; returns how many went. */
int64_t kh_pager_shrink(struct kh_pager *pager);
/* What the fault handler evicts first at the limit, in this order. */
int kh_pager_set_victims(struct kh_pager *pager, const uint32_t *index, uint64_t n);
/* Begin a new window: these pages were young in the last one. */
int kh_pager_note_young(struct kh_pager *pager, uint64_t index, uint64_t n_pages,
			const uint64_t *words);
int kh_pager_pin(struct kh_pager *pager, uint64_t index, uint64_t n_pages, int pinned);
/* Evict pages; outcome[i] tells what became of index[i]. Returns how many went. */
int64_t kh_pager_evict(struct kh_pager *pager, const uint32_t *index, uint64_t n,
		       uint8_t *outcome);
/* Bring pages back without a touch of the guest. Returns how many came. */
int64_t kh_pager_restore(struct kh_pager *pager, uint64_t index, uint64_t n_pages);
int kh_pager_state(struct kh_pager *pager, uint64_t index, uint64_t n_pages, uint8_t *states);
void kh_pager_counters(struct kh_pager *pager, struct kh_pager_counters *counters);
/* Bytes that page i takes in the store (8 for a same-filled one, 0 for none). */
uint64_t kh_pager_stored_bytes(struct kh_pager *pager, uint64_t index);

/* Fault injection for tests: make the next n stores, or loads, fail. */
void kh_pager_inject(struct kh_pager *pager, uint64_t failing_stores, uint64_t failing_loads);

#endif
