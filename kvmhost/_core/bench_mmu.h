/* Bare loops over 64-bit words: the baseline for the speed of a walk. */
#ifndef KVMHOST_BENCH_MMU_H
#define KVMHOST_BENCH_MMU_H

#include "compat.h"

/* A plain sum, without explicit vectorisation. */
uint64_t kh_bench_sum(const uint64_t *words, uint64_t n);
/* The same sum, vectorised (AVX2 where the CPU has it). */
uint64_t kh_bench_sum_wide(const uint64_t *words, uint64_t n);
/* Atomic and-not of one bit in every word. */
void kh_bench_and(uint64_t *words, uint64_t n, unsigned int bit);
/* Set one bit in every word; not atomic. */
void kh_bench_or(uint64_t *words, uint64_t n, unsigned int bit);
uint64_t kh_bench_now_ns(void);

#endif
