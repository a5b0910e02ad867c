/*
 * Table formats as data. Masks named raw_* are in the byte order of memory, so that
 * a scan tests entries as stored, including big-endian ones.
 *
 * Sources: AMD64 APM vol. 2, 5.3 and 15.25 (NPT); Intel SDM vol. 3C, 29.3 (EPT);
 * Arm ARM DDI 0487, D8.3 (VMSAv8-64 stage 2); Power ISA 3.0B, book III, 5.7.10
 * (radix); Linux v6.12 spte.h, kvm_pgtable.h, book3s/64/radix.h.
 */
#ifndef KVMHOST_MMU_FORMAT_INTERNAL_H
#define KVMHOST_MMU_FORMAT_INTERNAL_H

#include "compat.h"

#include <stdbool.h>

#include "mmu_core.h"

#define KH_MAX_LEVEL 5
#define KH_BIT(n) (1ull << (n))

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "raw masks assume a little-endian host");

/* Which bits to test in a leaf, and which to clear. */
struct kh_probe {
	uint64_t raw_quick;      /* an entry without any of these bits is skipped */
	uint64_t raw_mask[2];    /* [0] level 1, [1] above: entry & mask == value */
	uint64_t raw_value[2];
	uint64_t raw_clear;      /* one bit */
};

struct kh_format {
	uint32_t id;
	uint32_t n_levels;
	uint32_t page_shift;
	uint32_t shift[KH_MAX_LEVEL + 1];
	uint32_t bits[KH_MAX_LEVEL + 1];
	uint32_t max_leaf_level;
	bool big_endian;
	bool sw_access;
	uint64_t addr_mask;         /* output address of a leaf, CPU order */
	uint64_t table_mask;        /* address of the next table, CPU order */
	uint64_t raw_present;       /* any bit of it: present */
	uint64_t raw_page[2];       /* leaf at level 1: entry & [0] == [1] */
	uint64_t raw_huge[2];       /* leaf above level 1 */
	uint64_t raw_write;         /* a write needs one of these bits */
	uint64_t raw_write_all;     /* what write-protection clears */
	uint64_t raw_dirty_set;     /* what hardware sets on a write */
	uint64_t raw_frozen;        /* absent, and locked by another thread; 0: not used */
	struct kh_probe young;
	struct kh_probe dirty;
};

/* Byte order of the format <-> CPU order; its own inverse. */
static inline uint64_t kh_raw(const struct kh_format *fmt, uint64_t value)
{
	return fmt->big_endian ? __builtin_bswap64(value) : value;
}

static inline bool kh_present(const struct kh_format *fmt, uint64_t raw)
{
	return raw & fmt->raw_present;
}

static inline bool kh_leaf(const struct kh_format *fmt, uint64_t raw, unsigned int level)
{
	const uint64_t *test = level == 1 ? fmt->raw_page : fmt->raw_huge;

	return kh_present(fmt, raw) && (raw & test[0]) == test[1];
}

static inline bool kh_table(const struct kh_format *fmt, uint64_t raw, unsigned int level)
{
	return level > 1 && kh_present(fmt, raw) && !kh_leaf(fmt, raw, level);
}

static inline bool kh_probe_hit(const struct kh_format *fmt, const struct kh_probe *probe,
				uint64_t raw, unsigned int level)
{
	return (raw & probe->raw_mask[level > 1]) == probe->raw_value[level > 1] &&
	       kh_present(fmt, raw);
}

/* Base pages that an entry of a level maps. */
static inline uint64_t kh_level_pages(const struct kh_format *fmt, unsigned int level)
{
	return 1ull << (fmt->shift[level] - fmt->page_shift);
}

static inline uint64_t kh_index(const struct kh_format *fmt, uint64_t gfn, unsigned int level)
{
	return (gfn >> (fmt->shift[level] - fmt->page_shift)) & ((1ull << fmt->bits[level]) - 1);
}

static inline uint64_t kh_table_bytes(const struct kh_format *fmt, unsigned int level)
{
	return 8ull << fmt->bits[level];
}

static inline uint64_t kh_n_gfns(const struct kh_format *fmt)
{
	unsigned int top = fmt->n_levels;

	return 1ull << (fmt->shift[top] + fmt->bits[top] - fmt->page_shift);
}

/* A leaf of a level; flags are KH_LEAF_*. */
uint64_t kh_make_leaf(const struct kh_format *fmt, uint64_t pfn, unsigned int level,
		      unsigned int flags);
/* An entry of a level that points to a table of the level below. */
uint64_t kh_make_table(const struct kh_format *fmt, uint64_t pa, unsigned int level);

/* 4 KiB frame that a leaf maps first. */
static inline uint64_t kh_leaf_pfn(const struct kh_format *fmt, uint64_t raw)
{
	return (kh_raw(fmt, raw) & fmt->addr_mask) >> 12;
}

static inline bool kh_writable(const struct kh_format *fmt, uint64_t raw)
{
	return raw & fmt->raw_write;
}

static inline bool kh_young(const struct kh_format *fmt, uint64_t raw)
{
	return raw & fmt->young.raw_clear;
}

static inline bool kh_dirty(const struct kh_format *fmt, uint64_t raw)
{
	return raw & fmt->dirty.raw_clear;
}

int kh_format_init(struct kh_format *fmt, const struct kh_mmu_config *config);

#endif
