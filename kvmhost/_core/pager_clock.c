/*
 * Victim selection at the limit: first the pages that the daemon listed, then those
 * of a clock hand. The hand processes 64 pages at a time: which are resident, which
 * are evictable, and which were young in few enough of the last windows are one
 * word each.
 */
#include "pager_internal.h"

/*
 * How many windows a page may have been young in to be taken in the hand's first,
 * second, ... lap. A page that a scan touched once is evicted before one that was
 * young in every window. Each limit can be tested by one bit of the count.
 */
static const int lap_limits[] = { 0, 1, 3, 8 };

#define LAPS (sizeof(lap_limits) / sizeof(*lap_limits))

/* Which of 64 pages were young in at most this number of windows, counted in parallel. */
static uint64_t cold_mask(const struct kh_history *history, int limit)
{
	uint64_t ones = 0, twos = 0, more = 0;

	for (int w = 0; w < KH_HISTORY_WINDOWS; w++) {
		uint64_t young = __atomic_load_n(&history->window[w], __ATOMIC_RELAXED);
		uint64_t carry = ones & young;

		ones ^= young;
		more |= twos & carry;
		twos ^= carry;
	}
	if (limit == 0)
		return ~(ones | twos | more);
	if (limit == 1)
		return ~(twos | more);
	return limit == 3 ? ~more : ~0ull;
}

/* Take up to n pages of a word's set bits. */
static uint64_t take_bits(uint64_t bits, uint64_t base, uint32_t *index, uint64_t n)
{
	uint64_t found = 0;

	for (; bits && found < n; bits &= bits - 1)
		index[found++] = base + __builtin_ctzll(bits);
	return found;
}

/* Which of 64 pages are pinned, failed in this round, or cannot be evicted before a write. */
static uint64_t not_now(const struct kh_pager *pager, uint64_t word)
{
	return __atomic_load_n(&pager->pinned[word], __ATOMIC_RELAXED) |
	       __atomic_load_n(&pager->passed[word], __ATOMIC_RELAXED) |
	       __atomic_load_n(&pager->refused[word], __ATOMIC_RELAXED);
}

void kh_pager_new_round(struct kh_pager *pager)
{
	for (uint64_t word = 0; word <= pager->n_pages / 64; word++)
		__atomic_store_n(&pager->passed[word], 0, __ATOMIC_RELAXED);
	__atomic_store_n(&pager->space_freed, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&pager->lap, 0, __ATOMIC_RELAXED);
}

/* One revolution from the hand on; the hand stops after the last page taken. */
static uint64_t sweep(struct kh_pager *pager, int limit, uint32_t *index, uint64_t n)
{
	uint64_t n_words = (pager->n_pages + 63) / 64, hand = pager->hand % pager->n_pages;
	uint64_t word = hand / 64, from = ~0ull << (hand % 64), found = 0;

	/* The first word is visited twice: its pages before the hand are last. */
	for (uint64_t step = 0; step <= n_words && found < n; step++) {
		uint64_t bits = __atomic_load_n(&pager->resident[word], __ATOMIC_RELAXED) &
				~not_now(pager, word) & from;

		if (bits && limit < KH_HISTORY_WINDOWS)
			bits &= cold_mask(&pager->history[word], limit);
		found += take_bits(bits, word * 64, index + found, n - found);
		word = word + 1 < n_words ? word + 1 : 0;
		from = step + 1 == n_words ? ~(~0ull << (hand % 64)) : ~0ull;
	}
	if (found)
		pager->hand = index[found - 1] + 1ull;
	return found;
}

static uint64_t choose_by_clock(struct kh_pager *pager, uint32_t *index, uint64_t n)
{
	uint32_t lap = __atomic_load_n(&pager->lap, __ATOMIC_RELAXED);
	uint64_t found = 0;

	for (; !found && lap < LAPS; lap++) {
		found = sweep(pager, lap_limits[lap], index, n);
		/* No page becomes colder before the next window: do not scan again. */
		if (!found && lap + 1 < LAPS)
			__atomic_store_n(&pager->lap, lap + 1, __ATOMIC_RELAXED);
	}
	return found;
}

uint64_t kh_pager_choose(struct kh_pager *pager, uint32_t *index, uint64_t n)
{
	uint64_t found = 0;

	while (found < n && pager->next_victim < pager->n_victims) {
		uint32_t page = pager->victims[pager->next_victim++];

		/* Young since the daemon listed it: leave it to the clock. */
		if (kh_bit(pager->resident, page) &&
		    !(not_now(pager, page / 64) >> (page % 64) & 1) &&
		    !kh_pager_is_young(pager, page))
			index[found++] = page;
	}
	return found ? found : choose_by_clock(pager, index, n);
}

void kh_pager_forget_history(struct kh_pager *pager, uint64_t index)
{
	struct kh_history *history = &pager->history[index / 64];
	uint64_t bit = 1ull << (index % 64);

	for (int w = 0; w < KH_HISTORY_WINDOWS; w++)
		if (__atomic_load_n(&history->window[w], __ATOMIC_RELAXED) & bit)
			__atomic_fetch_and(&history->window[w], ~bit, __ATOMIC_RELAXED);
}

/* 64 bits of a bitmap of n bits from any bit on, also from before its start; zeros outside. */
static uint64_t bits_at(const uint64_t *words, uint64_t n, int64_t from)
{
	int64_t word = from >> 6, n_words = (n + 63) / 64;
	int shift = from & 63;
	uint64_t low = word >= 0 && word < n_words ? words[word] : 0;
	uint64_t high = word + 1 >= 0 && word + 1 < n_words ? words[word + 1] : 0;

	return shift ? low >> shift | high << (64 - shift) : low;
}

int kh_pager_note_young(struct kh_pager *pager, uint64_t index, uint64_t n_pages,
			const uint64_t *words)
{
	uint64_t end = index + n_pages;

	if (index > pager->n_pages || n_pages > pager->n_pages - index)
		return -ERANGE;
	/* A race with a fault-in loses at most one bit of history. */
	for (uint64_t base = index & ~63ull; base < end; base += 64) {
		uint64_t *window = pager->history[base / 64].window, mask = ~0ull;

		if (base < index)
			mask &= ~0ull << (index - base);
		if (end - base < 64)
			mask &= ~(~0ull << (end - base));
		for (int w = KH_HISTORY_WINDOWS - 1; w > 0; w--)
			window[w] = (window[w] & ~mask) | (window[w - 1] & mask);
		window[0] = (window[0] & ~mask) |
			    (bits_at(words, n_pages, (int64_t)(base - index)) & mask);
	}
	kh_pager_new_round(pager);
	return 0;
}
