/*
 * The harvest: test, or test and clear, the accessed (or dirty) bit of leaves.
 *
 * How a bit is cleared, and why that is enough:
 *
 * - tdp, last level: atomic and-not. The entry can only be a leaf or absent, an
 *   absent one never holds the bit (this MMU writes 0 and KH_FROZEN, the bits of
 *   which are chosen so), and the returned old bit identifies the thread that
 *   cleared it.
 * - tdp, above: compare-and-swap, since the entry may have become a table, whose
 *   bits must not change.
 * - stage 2: compare-and-swap, as all of the kernel's stage-2 code sets entries
 *   (stage2_try_set_pte); it fails if hardware or a fault handler changed the entry
 *   first, and the entry is read again.
 * - radix: compare-and-swap of the big-endian value (pte_xchg).
 *
 * In each case exactly one of several concurrent harvests changes the bit from 1 to
 * 0, and only that harvest reports it.
 */
#include "mmu_internal.h"

#include <string.h>

static void harvest_bits(uint64_t *bitmap, uint64_t bit, uint64_t value)
{
	bitmap[bit / 64] |= value << (bit % 64);
}

/* 64 bits (or what is left of n) of a bitmap from any bit position on. */
static uint64_t get_bits(const uint64_t *bitmap, uint64_t bit, unsigned int n)
{
	uint64_t value = bitmap[bit / 64] >> (bit % 64);

	if (bit % 64 && bit % 64 + n > 64)
		value |= bitmap[bit / 64 + 1] << (64 - bit % 64);
	return n < 64 ? value & ((1ull << n) - 1) : value;
}

static void put_bits(uint64_t *bitmap, uint64_t bit, unsigned int n, uint64_t value)
{
	harvest_bits(bitmap, bit, value);
	if (bit % 64 && bit % 64 + n > 64)
		bitmap[bit / 64 + 1] |= value >> (64 - bit % 64);
}

/* Clear one bit; true if this call changed it from 1 to 0. */
bool kh_clear_leaf(const struct kh_format *fmt, const struct kh_probe *probe, uint64_t *entry,
		   unsigned int level)
{
	uint64_t raw = kh_read_entry(entry);

	while (kh_probe_hit(fmt, probe, raw, level)) {
		if (__atomic_compare_exchange_n(entry, &raw, raw & ~probe->raw_clear, false,
						__ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE))
			return true;
	}
	return false;
}

/*
 * And-not on the marked entries of a last-level table. The bit number must be a
 * constant for the compiler to use `lock btr`, which returns the old bit.
 */
#define CLEAR_BY_AND(bit)                                                                        \
	static uint64_t clear_bit_##bit(uint64_t *entries, uint64_t todo)                        \
	{                                                                                        \
		uint64_t got = 0;                                                                \
                                                                                                 \
		for (; todo; todo &= todo - 1) {                                                 \
			unsigned int i = (unsigned int)__builtin_ctzll(todo);                    \
			bool was = (__atomic_fetch_and(&entries[i], ~KH_BIT(bit),                \
						       __ATOMIC_SEQ_CST) &                       \
				    KH_BIT(bit)) != 0;                                           \
                                                                                                 \
			got |= (uint64_t)was << i;                                               \
		}                                                                                \
		return got;                                                                      \
	}

CLEAR_BY_AND(5)
CLEAR_BY_AND(6)
CLEAR_BY_AND(8)
CLEAR_BY_AND(9)

/* Compare-and-swap on the marked entries; an entry that changes meanwhile is read again. */
static uint64_t clear_swapped(const struct kh_format *fmt, const struct kh_probe *probe,
			      uint64_t *entries, uint64_t todo)
{
	uint64_t mask = probe->raw_mask[0], value = probe->raw_value[0];
	uint64_t got = 0;

	for (; todo; todo &= todo - 1) {
		unsigned int i = (unsigned int)__builtin_ctzll(todo);
		uint64_t raw = kh_read_entry(&entries[i]);
		/* These formats have one present bit, which the mask includes. */
		bool done = (raw & mask) == value &&
			    kh_try_set(&entries[i], raw, raw & ~probe->raw_clear);

		if (__builtin_expect(!done, 0))
			done = kh_clear_leaf(fmt, probe, &entries[i], 1);
		got |= (uint64_t)done << i;
	}
	return got;
}

static uint64_t clear_word(const struct kh_mmu *mmu, const struct kh_probe *probe,
			   uint64_t *entries, uint64_t todo)
{
	const struct kh_format *fmt = &mmu->fmt;

	/* KVM's frozen entry has the accessed bits of both tdp layouts: and-not would change it. */
	if (mmu->flags & KH_MMU_KVM)
		return clear_swapped(fmt, probe, entries, todo);
	if (fmt->id == KH_FMT_NPT)
		return probe == &fmt->young ? clear_bit_5(entries, todo)
					    : clear_bit_6(entries, todo);
	if (fmt->id == KH_FMT_EPT)
		return probe == &fmt->young ? clear_bit_8(entries, todo)
					    : clear_bit_9(entries, todo);
	return clear_swapped(fmt, probe, entries, todo);
}

/* Check the hint of the scan, entry by entry. */
static uint64_t confirm(struct kh_harvest *harvest, const uint64_t *entries, uint64_t hint)
{
	const struct kh_format *fmt = &harvest->mmu->fmt;
	uint64_t young = 0;

	for (; hint; hint &= hint - 1) {
		unsigned int i = (unsigned int)__builtin_ctzll(hint);
		uint64_t raw = kh_read_entry(&entries[i]);

		if (__builtin_expect(raw == KH_POISON, 0)) {
			harvest->stats->poisoned++;
			continue;
		}
		young |= (uint64_t)kh_probe_hit(fmt, harvest->probe, raw, 1) << i;
	}
	return young;
}

static void harvest_word(struct kh_harvest *harvest, uint64_t *entries, uint64_t bit,
			 unsigned int n, uint64_t hint)
{
	uint64_t young = hint;
	uint64_t todo = 0;

	/*
	 * If all are cleared, the clear itself reports which were young; only if
	 * freed pages hold poison must each entry be read before it is modified.
	 */
	if (!harvest->clear || harvest->mask || harvest->careful)
		young = confirm(harvest, entries, hint);
	if (harvest->clear)
		todo = harvest->mask ? young & get_bits(harvest->mask, bit, n) : young;
	if (todo) {
		uint64_t got = clear_word(harvest->mmu, harvest->probe, entries, todo);

		/* Another harvest, or an unmap, cleared the bit first, and reports it. */
		young &= ~(todo & ~got);
		harvest->stats->cleared += (uint64_t)__builtin_popcountll(got);
		harvest->stats->lost += (uint64_t)__builtin_popcountll(todo & ~got);
	}
	harvest->stats->young += (uint64_t)__builtin_popcountll(young);
	put_bits(harvest->young, bit, n, young);
}

void kh_harvest_run(struct kh_harvest *harvest, uint64_t *entries, uint64_t gfn, uint64_t n)
{
	const struct kh_probe *probe = harvest->probe;
	uint64_t words[8];

	if (harvest->tables_only)
		return;
	harvest->stats->tables++;
	for (uint64_t done = 0; done < n; done += 512) {
		unsigned int count = n - done < 512 ? (unsigned int)(n - done) : 512;
		uint64_t bit = harvest->bit + (gfn - harvest->start) + done;

		if (!kh_scan(entries + done, count, probe->raw_quick, probe->raw_mask[0],
			     probe->raw_value[0], words))
			continue;
		for (unsigned int i = 0; i < count; i += 64)
			if (words[i / 64])
				harvest_word(harvest, entries + done + i, bit + i,
					     count - i < 64 ? count - i : 64, words[i / 64]);
	}
}

static bool any_bit(const uint64_t *bitmap, uint64_t bit, uint64_t n)
{
	for (uint64_t done = 0; done < n; done += 64)
		if (get_bits(bitmap, bit + done, n - done < 64 ? (unsigned int)(n - done) : 64))
			return true;
	return false;
}

static void fill_bits(uint64_t *bitmap, uint64_t bit, uint64_t n)
{
	for (uint64_t done = 0; done < n; done += 64) {
		unsigned int count = n - done < 64 ? (unsigned int)(n - done) : 64;

		put_bits(bitmap, bit + done, count,
			 count < 64 ? (1ull << count) - 1 : UINT64_MAX);
	}
}

void kh_harvest_huge(struct kh_harvest *harvest, uint64_t *entry, uint64_t raw, uint64_t gfn,
		     unsigned int level)
{
	const struct kh_format *fmt = &harvest->mmu->fmt;
	uint64_t first = gfn > harvest->start ? gfn : harvest->start;
	uint64_t last = gfn + kh_level_pages(fmt, level);
	uint64_t bit = harvest->bit + (first - harvest->start);

	if (harvest->mmu->flags & KH_MMU_KVM && level > fmt->max_leaf_level &&
	    kh_leaf(fmt, raw, level)) {
		kh_refuse(harvest->mmu, &harvest->descent, raw, level, gfn, KH_BAD_LEAF);
		return;
	}
	if (harvest->tables_only)
		return;
	last = last < harvest->end ? last : harvest->end;
	harvest->stats->huge_leaves++;
	if (raw == KH_POISON) {
		harvest->stats->poisoned++;
		return;
	}
	if (!kh_probe_hit(fmt, harvest->probe, raw, level))
		return;
	/* One bit for many pages: cleared if any of them is to be cleared. */
	if (harvest->clear && (!harvest->mask || any_bit(harvest->mask, bit, last - first))) {
		if (!kh_clear_leaf(fmt, harvest->probe, entry, level)) {
			harvest->stats->lost++;
			return;
		}
		harvest->stats->cleared++;
	}
	harvest->stats->young++;
	fill_bits(harvest->young, bit, last - first);
	fill_bits(harvest->coarse, bit, last - first);
}

/*
 * A walk that leaves its epoch keeps the root by a reference: tables under it may
 * be freed meanwhile, so the caller looks everything up again, but the root and its
 * place in the list remain valid. A root without references is being freed; the
 * walk then stays inside its current epoch, in which the root is safe.
 */
bool kh_harvest_yield(struct kh_harvest *harvest)
{
	struct kh_mmu *mmu = harvest->mmu;

	if (!harvest->may_yield || !kh_epoch_wanted(&mmu->epoch) || !kh_root_tryget(harvest->root))
		return false;
	kh_epoch_exit(&mmu->epoch, harvest->epoch_slot);
	kh_epoch_reclaim(&mmu->epoch);
	harvest->epoch_slot = kh_epoch_enter(&mmu->epoch);
	kh_root_put(mmu, harvest->root);
	harvest->stats->yields++;
	return true;
}

static void harvest_root(struct kh_harvest *harvest, struct kh_root *root)
{
	harvest->root = root;
	switch (harvest->mmu->fmt.id) {
	case KH_FMT_STAGE2:
		kh_stage2_harvest(harvest, root);
		break;
	case KH_FMT_RADIX:
		kh_radix_harvest(harvest, root);
		break;
	default:
		kh_tdp_harvest(harvest, root);
	}
}

static void harvest_segment(struct kh_harvest *harvest, const struct kh_segment *segment)
{
	struct kh_root *root;

	harvest->start = segment->gfn_start;
	harvest->end = segment->gfn_start + segment->n_pages;
	harvest->bit = segment->bit;
	if (harvest->end > kh_n_gfns(&harvest->mmu->fmt) || harvest->end < harvest->start)
		harvest->end = kh_n_gfns(&harvest->mmu->fmt);
	if (harvest->start >= harvest->end)
		return;
	kh_for_each_root_lockless(harvest->mmu, root, segment->as_id)
		harvest_root(harvest, root);
}

static void harvest_segments(struct kh_harvest *harvest, const struct kh_segment *segments,
			     uint32_t n_segments)
{
	harvest->epoch_slot = kh_epoch_enter(&harvest->mmu->epoch);
	for (uint32_t i = 0; i < n_segments; i++)
		harvest_segment(harvest, &segments[i]);
	kh_epoch_exit(&harvest->mmu->epoch, harvest->epoch_slot);
	harvest->stats->bad_pointers += harvest->descent.n_bad;
}

/*
 * Tables that a KVM owns are checked first: what a stale root leads to may be any memory
 * of that host, and none of it may be written.
 */
static bool tables_sound(struct kh_harvest *harvest, const struct kh_segment *segments,
			 uint32_t n_segments)
{
	if (!(harvest->mmu->flags & KH_MMU_KVM))
		return true;
	harvest->tables_only = true;
	harvest_segments(harvest, segments, n_segments);
	harvest->tables_only = false;
	return !harvest->descent.n_bad;
}

int kh_mmu_harvest_checked(struct kh_mmu *mmu, const struct kh_segment *segments,
			   uint32_t n_segments, uint32_t flags, const uint64_t *mask,
			   uint64_t *young, uint64_t *coarse, struct kh_walk_stats *stats,
			   struct kh_bad_entry *bad)
{
	struct kh_harvest harvest = {
		.mmu = mmu,
		.probe = flags & KH_HARVEST_DIRTY ? &mmu->fmt.dirty : &mmu->fmt.young,
		.clear = flags & KH_HARVEST_CLEAR,
		.careful = mmu->flags & KH_MMU_POISON,
		.may_yield = !(flags & KH_HARVEST_LOCKED),
		.mask = mask,
		.young = young,
		.coarse = coarse,
		.stats = stats,
	};

	if (flags & KH_HARVEST_LOCKED)
		kh_write_lock(&mmu->lock);
	if (tables_sound(&harvest, segments, n_segments))
		harvest_segments(&harvest, segments, n_segments);
	if (flags & KH_HARVEST_LOCKED)
		kh_unlock(&mmu->lock);
	*bad = harvest.descent.first;
	return mmu->flags & KH_MMU_KVM && bad->reason ? -EUCLEAN : 0;
}

int kh_mmu_harvest(struct kh_mmu *mmu, const struct kh_segment *segments, uint32_t n_segments,
		   uint32_t flags, const uint64_t *mask, uint64_t *young, uint64_t *coarse,
		   struct kh_walk_stats *stats)
{
	struct kh_bad_entry bad;

	return kh_mmu_harvest_checked(mmu, segments, n_segments, flags, mask, young, coarse,
				      stats, &bad);
}
