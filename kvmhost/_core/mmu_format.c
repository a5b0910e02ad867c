#include "mmu_format_internal.h"

#include <string.h>

#include "mmu_ops.h"

/*
 * The kernel's FROZEN_SPTE is 0x5a0, which contains the accessed bits of NPT and of
 * EPT; this value contains neither, so that clearing such a bit never changes it.
 */
#define KH_TDP_FROZEN 0x480ull

/* Equal index widths: 9 bits at each level over 4 KiB pages. */
static void even_levels(struct kh_format *fmt, unsigned int n_levels)
{
	fmt->n_levels = n_levels;
	fmt->page_shift = 12;
	for (unsigned int level = 1; level <= n_levels; level++) {
		fmt->shift[level] = 12 + 9 * (level - 1);
		fmt->bits[level] = 9;
	}
}

/* A probe for one bit of a present leaf; `extra` must be set beside it. */
static struct kh_probe probe_for(const struct kh_format *fmt, uint64_t bit, uint64_t extra)
{
	/* If any of several bits means present, kh_probe_hit() tests for them. */
	bool one_bit = !(fmt->raw_present & (fmt->raw_present - 1));
	uint64_t must = kh_raw(fmt, bit | extra) | (one_bit ? fmt->raw_present : 0);
	struct kh_probe probe = {
		.raw_quick = kh_raw(fmt, bit),
		.raw_mask = { must | fmt->raw_page[0], must | fmt->raw_huge[0] },
		.raw_value = { must | fmt->raw_page[1], must | fmt->raw_huge[1] },
		.raw_clear = kh_raw(fmt, bit),
	};

	return probe;
}

static int init_tdp(struct kh_format *fmt, const struct kh_mmu_config *config)
{
	unsigned int levels = config->levels ? config->levels : 4;
	bool ept = config->format == KH_FMT_EPT;
	uint64_t readable;

	if (levels != 4 && levels != 5)
		return -EINVAL;
	even_levels(fmt, levels);
	fmt->max_leaf_level = 3;
	fmt->addr_mask = fmt->table_mask = 0x000ffffffffff000ull;
	fmt->raw_present = ept ? 7 : KH_BIT(0);
	/*
	 * KVM tells present entries by a bit of its own (SPTE_MMU_PRESENT_MASK, since commit
	 * edea7c4fc215 (in v5.13)): its MMIO entries have hardware's bit set, and a generation
	 * where others have the accessed bit.
	 */
	if (config->flags & KH_MMU_KVM)
		fmt->raw_present = KH_BIT(11);
	fmt->raw_huge[0] = fmt->raw_huge[1] = KH_BIT(7);
	/* Leaves of this layer's own EPT are readable, so that the scan's answer is exact. */
	readable = ept && config->arena_bytes ? 1 : 0;
	if (config->flags & KH_MMU_KVM)
		readable = ept ? 0x1 : 0x5; /* readable; present and user */
	fmt->young = probe_for(fmt, KH_BIT(ept ? 8 : 5), readable);
	fmt->dirty = probe_for(fmt, KH_BIT(ept ? 9 : 6), readable);
	fmt->raw_write = fmt->raw_write_all = KH_BIT(1);
	fmt->raw_dirty_set = fmt->dirty.raw_clear;
	fmt->raw_frozen = KH_TDP_FROZEN;
	return 0;
}

/* Start level and concatenation as stage2_pgtable_levels() selects them. */
static int init_stage2(struct kh_format *fmt, const struct kh_mmu_config *config)
{
	unsigned int ipa_bits = config->ipa_bits ? config->ipa_bits : 40;
	bool kvm = config->flags & KH_MMU_KVM;
	uint64_t writable;

	if (ipa_bits < 32 || ipa_bits > (kvm ? 52 : 48))
		return -EINVAL;
	even_levels(fmt, (ipa_bits - 8) / 9);
	fmt->bits[fmt->n_levels] = ipa_bits - fmt->shift[fmt->n_levels];
	fmt->max_leaf_level = fmt->n_levels < 3 ? fmt->n_levels : 3;
	fmt->addr_mask = fmt->table_mask = 0x0000fffffffff000ull;
	if (kvm) /* FEAT_LPA2 has bits 48 and 49 of the address there */
		fmt->addr_mask = fmt->table_mask = 0x0003fffffffff000ull;
	fmt->raw_present = KH_BIT(0);
	fmt->raw_page[0] = fmt->raw_page[1] = KH_BIT(1);
	fmt->raw_huge[0] = KH_BIT(1);
	fmt->young = probe_for(fmt, KH_BIT(10), 0);
	/*
	 * FEAT_HAFDBS: with DBM (bit 51) set, S2AP[1] (bit 7) is the dirty state,
	 * and hardware sets it. Without DBM, a software bit (55) means that a fault
	 * may set it.
	 */
	writable = KH_BIT(fmt->sw_access ? 55 : 51);
	fmt->dirty = probe_for(fmt, KH_BIT(7), writable);
	fmt->raw_write = KH_BIT(7) | (fmt->sw_access ? 0 : writable);
	fmt->raw_write_all = KH_BIT(7) | writable;
	fmt->raw_dirty_set = KH_BIT(7);
	fmt->raw_frozen = KH_BIT(10); /* KVM_INVALID_PTE_LOCKED */
	return 0;
}

static int init_radix(struct kh_format *fmt, const struct kh_mmu_config *config)
{
	unsigned int page_shift = config->page_shift ? config->page_shift : 12;

	if (page_shift != 12 && page_shift != 16)
		return -EINVAL;
	even_levels(fmt, 4);
	fmt->page_shift = fmt->shift[1] = page_shift;
	fmt->bits[1] = 21 - page_shift;
	fmt->bits[4] = 13;
	fmt->max_leaf_level = 3;
	fmt->big_endian = true;
	fmt->addr_mask = 0x00fffffffffff000ull & ~((1ull << page_shift) - 1);
	fmt->table_mask = 0x0fffffffffffff00ull;
	fmt->raw_present = kh_raw(fmt, KH_BIT(63));
	fmt->raw_page[0] = fmt->raw_page[1] = kh_raw(fmt, KH_BIT(62));
	fmt->raw_huge[0] = fmt->raw_huge[1] = kh_raw(fmt, KH_BIT(62));
	fmt->young = probe_for(fmt, 0x100, 0);
	fmt->dirty = probe_for(fmt, 0x80, 0);
	fmt->raw_write = fmt->raw_write_all = kh_raw(fmt, 0x2);
	fmt->raw_dirty_set = fmt->dirty.raw_clear;
	return 0;
}

/* Flags that a format keeps in a leaf beside the address. */
static uint64_t leaf_bits(const struct kh_format *fmt, unsigned int level, unsigned int flags)
{
	bool write = flags & KH_LEAF_WRITE, young = flags & KH_LEAF_YOUNG;
	bool dirty = flags & KH_LEAF_DIRTY;
	uint64_t huge = level > 1 ? KH_BIT(7) : 0;

	switch (fmt->id) {
	case KH_FMT_NPT: /* P, U; W with host- and MMU-writable (bits 9, 10) */
		return 0x5 | huge | (write ? 0x602 : 0) | (young ? 0x20 : 0) | (dirty ? 0x40 : 0);
	case KH_FMT_EPT: /* R, X, write-back, IPAT; W with bits 57 and 58 */
		return 0x75 | huge | (write ? 0x2 | KH_BIT(57) | KH_BIT(58) : 0) |
		       (young ? 0x100 : 0) | (dirty ? 0x200 : 0);
	case KH_FMT_STAGE2: /* valid, normal memory, S2AP[0], inner shareable; dirty is S2AP[1] */
		return 0x1 | (level == 1 ? 0x2 : 0) | 0xf << 2 | 0x40 | 0x300 |
		       (write ? KH_BIT(fmt->sw_access ? 55 : 51) : 0) | (young ? 0x400 : 0) |
		       (write && dirty ? 0x80 : 0);
	default: /* radix: present, leaf, read, execute */
		return KH_BIT(63) | KH_BIT(62) | 0x5 | (write ? 0x2 : 0) | (young ? 0x100 : 0) |
		       (dirty ? 0x80 : 0);
	}
}

uint64_t kh_make_leaf(const struct kh_format *fmt, uint64_t pfn, unsigned int level,
		      unsigned int flags)
{
	return kh_raw(fmt, ((pfn << 12) & fmt->addr_mask) | leaf_bits(fmt, level, flags));
}

uint64_t kh_make_table(const struct kh_format *fmt, uint64_t pa, unsigned int level)
{
	switch (fmt->id) {
	case KH_FMT_NPT: /* P, W, U, A */
		return pa | 0x27;
	case KH_FMT_EPT: /* R, W, X, A */
		return pa | 0x107;
	case KH_FMT_STAGE2:
		return pa | 0x3;
	default: /* radix: present, and the index width of the next table */
		return kh_raw(fmt, pa | KH_BIT(63) | fmt->bits[level - 1]);
	}
}

int kh_format_init(struct kh_format *fmt, const struct kh_mmu_config *config)
{
	memset(fmt, 0, sizeof(*fmt));
	fmt->id = config->format;
	fmt->sw_access = config->flags & KH_MMU_SW_ACCESS;
	switch (config->format) {
	case KH_FMT_NPT:
	case KH_FMT_EPT:
		return init_tdp(fmt, config);
	case KH_FMT_STAGE2:
		return init_stage2(fmt, config);
	case KH_FMT_RADIX:
		return init_radix(fmt, config);
	default:
		return -EINVAL;
	}
}

int kh_mmu_shape(const struct kh_mmu_config *config, struct kh_mmu_shape *shape)
{
	struct kh_format fmt;
	int result = kh_format_init(&fmt, config);

	if (result < 0)
		return result;
	memset(shape, 0, sizeof(*shape));
	shape->n_levels = fmt.n_levels;
	shape->page_shift = fmt.page_shift;
	memcpy(shape->shift, fmt.shift, sizeof(fmt.shift));
	memcpy(shape->bits, fmt.bits, sizeof(fmt.bits));
	shape->n_gfns = kh_n_gfns(&fmt);
	return 0;
}
