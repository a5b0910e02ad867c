/*
 * Scan of last-level entries: which of them are young.
 *
 * The vector form reads entries that hardware changes meanwhile with plain vector
 * loads. That is sound here because its answer is a hint: each entry that it
 * reports is read again, atomically, before anything is reported or cleared, and an
 * entry that it does not report had, at the time, the byte of its accessed bit read
 * as old. Under ThreadSanitizer only the scalar form is built.
 */
#include "mmu_internal.h"

#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#define HAVE_AVX2_FORM 1
#include <immintrin.h>
#endif

static bool scan_scalar(const uint64_t *entries, unsigned int n, uint64_t quick, uint64_t mask,
			uint64_t value, uint64_t *out)
{
	uint64_t any = 0;

	for (unsigned int base = 0; base < n; base += 64) {
		unsigned int count = n - base < 64 ? n - base : 64;
		uint64_t bits = 0;

		for (unsigned int i = 0; i < count; i++) {
			uint64_t raw = __atomic_load_n(&entries[base + i], __ATOMIC_RELAXED);

			if (__builtin_expect((raw & quick) != 0, 0))
				bits |= (uint64_t)((raw & mask) == value) << i;
		}
		out[base / 64] = bits;
		any |= bits;
	}
	return any != 0;
}

#ifdef HAVE_AVX2_FORM
__attribute__((target("avx2"))) static inline uint64_t match64(const __m256i *entries,
								__m256i mask, __m256i value)
{
	uint64_t bits = 0;

	for (int i = 0; i < 16; i++) {
		__m256i v = _mm256_loadu_si256(&entries[i]);
		__m256i hit = _mm256_cmpeq_epi64(_mm256_and_si256(v, mask), value);

		bits |= (uint64_t)(unsigned int)_mm256_movemask_pd(_mm256_castsi256_pd(hit))
			<< (4 * i);
	}
	return bits;
}

__attribute__((target("avx2"))) static bool scan_avx2(const uint64_t *entries, unsigned int n,
						      uint64_t quick, uint64_t mask,
						      uint64_t value, uint64_t *out)
{
	const __m256i vquick = _mm256_set1_epi64x((long long)quick);
	const __m256i vmask = _mm256_set1_epi64x((long long)mask);
	const __m256i vvalue = _mm256_set1_epi64x((long long)value);
	unsigned int whole = n & ~63u;
	bool any = false;

	for (unsigned int base = 0; base < whole; base += 64) {
		const __m256i *v = (const __m256i *)&entries[base];
		__m256i a = _mm256_loadu_si256(&v[0]);
		__m256i b = _mm256_loadu_si256(&v[1]);

		for (int i = 2; i < 16; i += 2) {
			a = _mm256_or_si256(a, _mm256_loadu_si256(&v[i]));
			b = _mm256_or_si256(b, _mm256_loadu_si256(&v[i + 1]));
		}
		out[base / 64] = 0;
		if (!_mm256_testz_si256(_mm256_or_si256(a, b), vquick)) {
			out[base / 64] = match64(v, vmask, vvalue);
			any |= out[base / 64] != 0;
		}
	}
	if (whole < n)
		any |= scan_scalar(entries + whole, n - whole, quick, mask, value,
				   out + whole / 64);
	return any;
}
#endif

static int level = -1;

int kh_scan_level(int force)
{
	int found = 0;

#ifdef HAVE_AVX2_FORM
	found = __builtin_cpu_supports("avx2") ? 1 : 0;
#endif
	if (force >= 0)
		__atomic_store_n(&level, force < found ? force : found, __ATOMIC_RELAXED);
	else if (__atomic_load_n(&level, __ATOMIC_RELAXED) < 0)
		__atomic_store_n(&level, found, __ATOMIC_RELAXED);
	return __atomic_load_n(&level, __ATOMIC_RELAXED);
}

bool kh_scan(const uint64_t *entries, unsigned int n, uint64_t quick, uint64_t mask,
	     uint64_t value, uint64_t *out)
{
#ifdef HAVE_AVX2_FORM
	if (kh_scan_level(-1) == 1)
		return scan_avx2(entries, n, quick, mask, value, out);
#endif
	return scan_scalar(entries, n, quick, mask, value, out);
}
