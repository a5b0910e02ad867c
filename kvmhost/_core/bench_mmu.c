#include "bench_mmu.h"

#include <time.h>

uint64_t kh_bench_sum(const uint64_t *words, uint64_t n)
{
	uint64_t sum = 0;

	for (uint64_t i = 0; i < n; i++)
		sum += words[i];
	return sum;
}

static inline __attribute__((always_inline)) uint64_t sum(const uint64_t *words, uint64_t n)
{
	uint64_t total[4] = { 0 };

	/* Four independent sums, one per element of a vector register. n is a multiple of 4. */
	for (uint64_t i = 0; i + 4 <= n; i += 4)
		for (unsigned int lane = 0; lane < 4; lane++)
			total[lane] += words[i + lane];
	return total[0] + total[1] + total[2] + total[3];
}

#if defined(__x86_64__)
__attribute__((target("avx2"), optimize("O3", "unroll-loops"))) static uint64_t
sum_avx2(const uint64_t *words, uint64_t n)
{
	return sum(words, n);
}
#endif

uint64_t kh_bench_sum_wide(const uint64_t *words, uint64_t n)
{
#if defined(__x86_64__)
	if (__builtin_cpu_supports("avx2"))
		return sum_avx2(words, n);
#endif
	return sum(words, n);
}

void kh_bench_and(uint64_t *words, uint64_t n, unsigned int bit)
{
	uint64_t keep = ~(1ull << bit);

	for (uint64_t i = 0; i < n; i++)
		__atomic_and_fetch(&words[i], keep, __ATOMIC_SEQ_CST);
}

void kh_bench_or(uint64_t *words, uint64_t n, unsigned int bit)
{
	for (uint64_t i = 0; i < n; i++)
		words[i] |= 1ull << bit;
}

uint64_t kh_bench_now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}
