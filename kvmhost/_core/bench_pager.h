/* For kvmhost bench pager: a minimal pager for comparison, and a test of the store alone. */
#ifndef KVMHOST_BENCH_PAGER_H
#define KVMHOST_BENCH_PAGER_H

#include "codec.h"

/*
 * Touch pages, one read each, in the calling thread: times[i] is what the touch
 * of pages[i] took, in ns.
 */
void kh_bench_touch(uint64_t address, const uint32_t *pages, uint64_t n, uint64_t *times);

/*
 * A minimal eviction and fault-in path: pages are copied out of the memfd by pread,
 * punched in runs, and copied back by UFFDIO_COPY in a thread that does nothing
 * else. No compression, no locks, no limits, no counters, and no protection against
 * writes: it only measures the cost of the kernel.
 */
struct kh_bench_pager;

struct kh_bench_pager *kh_bench_pager_new(int uffd, int memfd, uint64_t address, uint64_t n_pages);
/* Evict all pages in runs of neighbours; 0 or -errno. */
int kh_bench_pager_evict(struct kh_bench_pager *pager);
void kh_bench_pager_free(struct kh_bench_pager *pager);

struct kh_bench_store {
	uint64_t put_ns;
	uint64_t get_ns;
	uint64_t stored_bytes;
	uint64_t same_filled_pages;
	uint64_t raw_pages;
};

/* Put n pages into a store in memory and get them back; 0, or -errno if one differs. */
int kh_bench_store(const struct kh_codec *codec, const char *pages, uint64_t n,
		   struct kh_bench_store *result);

#endif
