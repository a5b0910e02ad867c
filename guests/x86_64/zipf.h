/*
 * Zipf-distributed ranks in integer arithmetic, the same on every machine.
 *
 * Rank k = 0 .. n - 1 has the weight
 *   w(k) = floor(2^32 * 2^-(E / 2^24)), E = floor(s * L / 1000), L = floor(2^24 * log2(k + 1)),
 * which is 2^32 / (k + 1)^(s / 1000) up to rounding. A random number x selects
 * the rank at which the sum of the weights first exceeds x % (sum of all).
 */
#ifndef ZIPF_H
#define ZIPF_H

#include "guest.h"

typedef unsigned __int128 u128;

enum { LOG_BITS = 24 };

/* floor(2^24 * log2(x)), one bit per squaring: m in [1, 2) has 63 bits after the point. */
static inline u64 log2_fixed(u64 x)
{
	u64 whole = 63 - (u64)__builtin_clzl(x), m = x << (63 - whole), log = whole;

	for (int i = 0; i < LOG_BITS; i++) {
		u128 square = (u128)m * m;
		u64 carry = (u64)(square >> 127);

		log = log << 1 | carry;
		m = (u64)(square >> (63 + carry));
	}
	return log;
}

static inline u64 root(u128 x)
{
	u64 found = 0;

	for (u64 bit = 1ul << 63; bit; bit >>= 1)
		if ((u128)(found | bit) * (found | bit) <= x)
			found |= bit;
	return found;
}

/* Fill sums[k] = w(0) + ... + w(k). */
static inline void zipf_sums(u64 *sums, u64 n, u64 permille)
{
	u64 factor[LOG_BITS], half = 1ul << 63, sum = 0;

	/* factor[b] = 2^-(2^b / 2^24) with 64 bits after the point: roots of a half. */
	for (int b = LOG_BITS - 1; b >= 0; b--)
		factor[b] = half = root((u128)half << 64);
	for (u64 k = 0; k < n; k++) {
		u64 e = permille * log2_fixed(k + 1) / 1000, x = 1ul << 63;

		for (int b = 0; b < LOG_BITS; b++)
			if (e >> b & 1)
				x = (u64)((u128)x * factor[b] >> 64);
		sum += e >> LOG_BITS > 32 ? 0 : x >> (31 + (e >> LOG_BITS));
		sums[k] = sum;
	}
}

static inline u64 zipf_rank(const u64 *sums, u64 n, u64 random)
{
	u64 x = random % sums[n - 1], low = 0, high = n - 1;

	while (low < high) {
		u64 middle = (low + high) / 2;

		if (sums[middle] > x)
			high = middle;
		else
			low = middle + 1;
	}
	return low;
}

#endif
