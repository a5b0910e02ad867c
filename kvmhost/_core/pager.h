/*
 * Eviction and fault-in. The pager owns the evicted pages of one VM: it copies a
 * page from the memfd, compresses it, punches it, and restores it when userfaultfd
 * reports a missing fault.
 *
 * Pages are numbered 0 .. n_pages - 1 over all regions, in the order in which the
 * regions were added ("index"). Both mappings of a region are registered: a touch
 * of an evicted page through either mapping faults it in.
 */
#ifndef KVMHOST_PAGER_H
#define KVMHOST_PAGER_H

#include "codec.h"

#define KH_PAGE_RESIDENT 0	/* in the memfd; before arming, or never touched */
#define KH_PAGE_EVICTED 1	/* only in the store */
#define KH_PAGE_LOST 2		/* the store could not return it: the VM must stop */
#define KH_PAGE_FRESH 3		/* never touched: neither in the memfd nor in the store */
#define KH_PAGE_SWAPPED 4	/* held by the memfd, in the host's swap */

/* Outcome of one eviction. */
#define KH_EVICT_DONE 0
#define KH_EVICT_PINNED 1	/* never evicted */
#define KH_EVICT_ABSENT 2	/* no page: evicted already, or never touched */
#define KH_EVICT_FULL 3		/* the store's limit is reached */
#define KH_EVICT_REFUSED 4	/* does not compress, and the policy keeps such pages resident */
#define KH_EVICT_ERROR 5	/* a system call or the codec failed */
#define KH_EVICT_STAYED 6	/* in a huge page that was not split; still resident */
#define KH_EVICT_OUTCOMES 7

/* What happened to a page; evictions by whose decision. */
#define KH_EVENT_EVICTED_DAEMON 0	/* requested by the holder of the VM's lease */
#define KH_EVENT_EVICTED_REQUEST 1	/* requested by anybody else */
#define KH_EVENT_EVICTED_LIMIT 2	/* chosen by the pager, to hold the resident limit */
#define KH_EVENT_EVICTED_MEMORY 3	/* chosen by the pager, the host had no memory */
#define KH_EVENT_REFAULTED 4		/* brought back by a touch */
#define KH_EVENT_RESTORED 5		/* brought back without one: on request, or prefetched */
#define KH_EVENT_DROPPED 6		/* declared free by the guest */
#define KH_EVENTS 7

#define KH_LATENCY_BUCKETS 40	/* bucket b: [2^b, 2^(b+1)) ns */

struct kh_pager_counters {
	uint64_t resident_pages;	/* pages in the memfds; counted once armed */
	uint64_t swapped_pages;		/* memfd pages that were found in the host's swap */
	uint64_t evicted_pages;		/* pages in the store now */
	uint64_t same_filled_pages;	/* of these, kept as one word */
	uint64_t raw_pages;		/* of these, kept uncompressed */
	uint64_t store_bytes;		/* used by page contents in the store */
	uint64_t store_held_bytes;	/* memory allocated for them */
	uint64_t evictions;
	uint64_t direct_evictions;	/* of these, made by the fault handler at the limit */
	uint64_t fault_ins;		/* pages brought back because of a touch */
	uint64_t restored_pages;	/* pages brought back on request */
	uint64_t prefetched_pages;	/* pages brought back beside one that was touched */
	uint64_t dropped_pages;		/* pages that the guest declared free, wherever they were */
	uint64_t dropped_evicted_pages;	/* of these, dropped from the store */
	uint64_t paged_out_pages;	/* handed to the host's swap */
	uint64_t zero_fills;		/* first touches of a page while armed */
	uint64_t wp_faults;		/* writes that met an eviction */
	uint64_t wakes;			/* faults whose page was resident already */
	uint64_t over_limit;		/* faults served above the limit, nothing to evict */
	uint64_t split_pieces;		/* of 2 MiB that were huge pages before an eviction */
	uint64_t stayed_pages;		/* punched, but found still in memory */
	uint64_t memory_waits;		/* faults that found no memory on the host */
	uint64_t memory_evictions;	/* pages evicted to free memory */
	uint64_t pending_faults;	/* faults that are waiting for memory */
	uint64_t errors;
	uint64_t lost_pages;
	uint64_t moved_records;		/* records moved to empty sparse chunks */
	uint64_t disk_full;		/* evictions refused because the store's file was full */
	uint64_t outcomes[KH_EVICT_OUTCOMES];
	uint64_t latency_sum_ns;	/* handling time of all fault-ins together */
	uint64_t latency[KH_LATENCY_BUCKETS];	/* fault-ins by handling time; their number is the sum */
};

/* Result of bringing the pages of a range back. */
struct kh_restore_result {
	uint64_t restored;	/* came back */
	uint64_t lost;		/* the store could not return them */
	uint64_t left;		/* still in the store: the host had no memory for them */
};

/* Result of enforcing the resident limit. */
struct kh_shrink_result {
	uint64_t evicted;
	uint64_t over_pages;	/* pages still above the limit; 0: within the limit */
};

/* Result of dropping a range that the guest declared free. */
struct kh_drop_result {
	uint64_t dropped;	/* read as zeros from here on */
	uint64_t pinned;	/* stayed as they were */
	uint64_t failed;
};

struct kh_pager;

/*
 * uffd: an open userfaultfd after UFFDIO_API. n_pages: of all regions that will be
 * added. store_fd: the store's file, or -1 for memory. NULL if out of memory.
 */
struct kh_pager *kh_pager_new(int uffd, uint64_t n_pages, const struct kh_codec *codec,
			      int store_fd);
/* Add a region before arming; returns the index of its first page or -errno. */
int64_t kh_pager_add_region(struct kh_pager *pager, int memfd, uint64_t guest, uint64_t alias,
			    uint64_t n_pages);
/*
 * Register both mappings for missing and write-protect faults. After an error
 * nothing is registered and the waiters have been woken: the call may be repeated.
 * split_all: memory may hold huge pages of other sizes than 2 MiB, which cannot be
 * detected.
 */
int kh_pager_arm(struct kh_pager *pager, int split_all);
/*
 * Serve faults until kh_pager_stop; 0, or -errno if the userfaultfd broke. A page
 * that cannot be brought back does not end this call: guest threads keep waiting
 * for it, a touch by the VMM itself raises SIGBUS, and kh_pager_wait_failure
 * returns.
 */
int kh_pager_serve(struct kh_pager *pager);
/*
 * Wait, in another thread than kh_pager_serve, until a fault cannot be served;
 * returns the errno of the first one, or 0 after kh_pager_stop.
 */
int kh_pager_wait_failure(struct kh_pager *pager);
/* Wait until a thread is inside kh_pager_serve. */
void kh_pager_wait_serving(struct kh_pager *pager);
void kh_pager_stop(struct kh_pager *pager);
void kh_pager_free(struct kh_pager *pager);

/* Limit on what the store holds, in bytes (0: none); what to do with pages that do not compress. */
void kh_pager_set_store(struct kh_pager *pager, uint64_t limit_bytes, int refuse_raw);
/* Bring back up to this number of the pages that follow a touched page and were evicted with it. */
void kh_pager_set_prefetch(struct kh_pager *pager, uint32_t n_pages);
/* How long a fault waits for memory on the host before it counts as failed. */
void kh_pager_set_memory_wait(struct kh_pager *pager, uint64_t ns);
/* Errno of the last page that was lost: EBADMSG for a checksum, EIO for a read. */
int kh_pager_lost_errno(struct kh_pager *pager);
/* Resident limit in pages (0: none), enforced by the fault handler itself. */
void kh_pager_set_limit(struct kh_pager *pager, uint64_t resident_pages);
uint64_t kh_pager_limit(struct kh_pager *pager);
/*
 * Evict, as the fault handler would, until the limit holds or every evictable page
 * was tried.
 */
void kh_pager_shrink(struct kh_pager *pager, struct kh_shrink_result *result);
/* The pages that the fault handler evicts first at the limit, in this order. */
int kh_pager_set_victims(struct kh_pager *pager, const uint32_t *index, uint64_t n);
/* Begin a new window: these pages were young in the last one. */
int kh_pager_note_young(struct kh_pager *pager, uint64_t index, uint64_t n_pages,
			const uint64_t *words);
int kh_pager_pin(struct kh_pager *pager, uint64_t index, uint64_t n_pages, int pinned);
/*
 * Evict pages; outcome[i] is the result for index[i]. Returns the number of evicted pages.
 * event: KH_EVENT_EVICTED_*, which says who decided so.
 */
int64_t kh_pager_evict(struct kh_pager *pager, const uint32_t *index, uint64_t n, uint32_t event,
		       uint8_t *outcome);
/* Bring pages back without a touch of the guest; a page that fails does not affect the others. */
int kh_pager_restore(struct kh_pager *pager, uint64_t index, uint64_t n_pages,
		     struct kh_restore_result *result);
/* Forget the contents of pages: their next touch finds zeros. Armed or not. */
int kh_pager_drop(struct kh_pager *pager, uint64_t index, uint64_t n_pages,
		  struct kh_drop_result *result);
/*
 * Hand pages to the host's swap by MADV_PAGEOUT; outcome[i] is KH_EVICT_DONE if the
 * page has left memory, _REFUSED if the kernel did not reclaim it.
 */
int64_t kh_pager_pageout(struct kh_pager *pager, const uint32_t *index, uint64_t n,
			 uint8_t *outcome);
int kh_pager_state(struct kh_pager *pager, uint64_t index, uint64_t n_pages, uint8_t *states);
/* Where a reader of the log is. */
struct kh_log_position {
	uint64_t next;	/* number of the event after those that were read */
	uint64_t end;	/* number of the next event that will happen */
	uint64_t lost;	/* events that were overwritten before they were read */
};

/*
 * Read up to n events of the log from number since on, each as event << 32 | index of the
 * page; returns their number.
 */
uint64_t kh_pager_read_log(struct kh_pager *pager, uint64_t since, uint64_t *out, uint64_t n,
			   struct kh_log_position *position);
void kh_pager_counters(struct kh_pager *pager, struct kh_pager_counters *counters);
/* Bytes that page i uses in the store (8 for a same-filled one, 0 for none). */
uint64_t kh_pager_stored_bytes(struct kh_pager *pager, uint64_t index);

/* Fault injection for tests: how many of the next calls of each kind fail. */
struct kh_injection {
	uint64_t stores;
	uint64_t loads;
	uint64_t fills;		/* of a missing page, for lack of memory */
	uint64_t splits;	/* huge pages are not detected */
};
void kh_pager_inject(struct kh_pager *pager, const struct kh_injection *failures);
/* For tests: have pages taken to be in the host's swap, or no longer. */
int kh_pager_fake_swap(struct kh_pager *pager, uint64_t index, uint64_t n_pages, int swapped);

#endif
