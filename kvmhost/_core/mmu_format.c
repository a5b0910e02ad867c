#include <string.h>

#include "mmu_format_internal.h"

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
	/* Where any of several bits means present, kh_probe_hit() tests that itself. */
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

	if (levels != 4 && levels != 5)
		return -EINVAL;
	even_levels(fmt, levels);
	fmt->max_leaf_level = 3;
	fmt->addr_mask = fmt->table_mask = 0x000ffffffffff000ull;
	fmt->raw_present = ept ? 7 : KH_BIT(0);
	fmt->raw_huge[0] = fmt->raw_huge[1] = KH_BIT(7);
	fmt->young = probe_for(fmt, KH_BIT(ept ? 8 : 5), 0);
	fmt->dirty = probe_for(fmt, KH_BIT(ept ? 9 : 6), 0);
	return 0;
}

/* Start level and concatenation as stage2_pgtable_levels() picks them. */
static int init_stage2(struct kh_format *fmt, const struct kh_mmu_config *config)
{
	unsigned int ipa_bits = config->ipa_bits ? config->ipa_bits : 40;

	if (ipa_bits < 32 || ipa_bits > 48)
		return -EINVAL;
	even_levels(fmt, (ipa_bits - 8) / 9);
	fmt->bits[fmt->n_levels] = ipa_bits - fmt->shift[fmt->n_levels];
	fmt->max_leaf_level = fmt->n_levels < 3 ? fmt->n_levels : 3;
	fmt->addr_mask = fmt->table_mask = 0x0000fffffffff000ull;
	fmt->raw_present = KH_BIT(0);
	fmt->raw_page[0] = fmt->raw_page[1] = KH_BIT(1);
	fmt->raw_huge[0] = KH_BIT(1);
	fmt->young = probe_for(fmt, KH_BIT(10), 0);
	/* FEAT_HAFDBS: with DBM (bit 51) set, S2AP[1] (bit 7) is the dirty state. */
	fmt->dirty = probe_for(fmt, KH_BIT(7), KH_BIT(51));
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
	return 0;
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
