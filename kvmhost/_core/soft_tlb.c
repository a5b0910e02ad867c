/*
 * A TLB: set-associative, evicting the least recently used entry; huge translations
 * have a separate part. It caches that a page was accessed (and written): a hit
 * does not set bits in the tables, so after a harvest a page can be used and stay
 * old.
 */
#include "soft_internal.h"

#include <stdlib.h>
#include <string.h>

static bool power_of_two(uint32_t n)
{
	return n && !(n & (n - 1));
}

int kh_tlb_init(struct kh_tlb *tlb, uint32_t sets, uint32_t ways, uint32_t huge_sets,
		uint32_t huge_ways, const struct kh_format *fmt)
{
	memset(tlb, 0, sizeof(*tlb));
	if ((sets && (!power_of_two(sets) || !ways)) ||
	    (huge_sets && (!power_of_two(huge_sets) || !huge_ways)))
		return -EINVAL;
	tlb->part[0] = (struct kh_tlb_part){ .sets = sets, .ways = ways };
	tlb->part[1] = (struct kh_tlb_part){ .sets = huge_sets, .ways = huge_ways };
	for (unsigned int level = 1; level <= 3; level++)
		tlb->shift[level] = fmt->shift[level] ? fmt->shift[level] - fmt->page_shift : 0;
	for (int i = 0; i < 2; i++) {
		struct kh_tlb_part *part = &tlb->part[i];

		if (!part->sets)
			continue;
		part->entries = calloc((size_t)part->sets * part->ways, sizeof(*part->entries));
		if (!part->entries) {
			kh_tlb_destroy(tlb);
			return -ENOMEM;
		}
	}
	return 0;
}

void kh_tlb_destroy(struct kh_tlb *tlb)
{
	free(tlb->part[0].entries);
	free(tlb->part[1].entries);
}

struct kh_tlb *kh_tlb_new(uint32_t sets, uint32_t ways, uint32_t huge_sets, uint32_t huge_ways,
			  uint32_t format, uint32_t page_shift)
{
	struct kh_mmu_config config = { .format = format, .page_shift = page_shift };
	struct kh_format fmt;
	struct kh_tlb *tlb = malloc(sizeof(*tlb));

	if (!tlb || kh_format_init(&fmt, &config) < 0 ||
	    kh_tlb_init(tlb, sets, ways, huge_sets, huge_ways, &fmt) < 0) {
		free(tlb);
		return NULL;
	}
	return tlb;
}

void kh_tlb_free(struct kh_tlb *tlb)
{
	kh_tlb_destroy(tlb);
	free(tlb);
}

static struct kh_tlb_entry *find(struct kh_tlb *tlb, uint64_t gfn, unsigned int level)
{
	struct kh_tlb_part *part = &tlb->part[level > 1];
	uint64_t tag = gfn >> tlb->shift[level];
	struct kh_tlb_entry *set;

	if (!part->sets)
		return NULL;
	set = &part->entries[(tag & (part->sets - 1)) * part->ways];
	for (uint32_t way = 0; way < part->ways; way++)
		if (set[way].level == level && set[way].tag == tag)
			return &set[way];
	return NULL;
}

int kh_tlb_lookup(struct kh_tlb *tlb, uint64_t gfn, int write)
{
	for (unsigned int level = 1; level <= 3; level++) {
		struct kh_tlb_entry *entry = find(tlb, gfn, level);

		if (!entry)
			continue;
		/* A write through a translation that was never written walks again. */
		if (write && !entry->write)
			return 0;
		entry->used = ++tlb->clock;
		return (int)level;
	}
	return 0;
}

void kh_tlb_insert(struct kh_tlb *tlb, uint64_t gfn, uint32_t level, int write)
{
	struct kh_tlb_part *part = &tlb->part[level > 1];
	uint64_t tag = gfn >> tlb->shift[level];
	struct kh_tlb_entry *entry = find(tlb, gfn, level);

	if (!part->sets)
		return;
	if (!entry) {
		struct kh_tlb_entry *set = &part->entries[(tag & (part->sets - 1)) * part->ways];

		entry = set;
		for (uint32_t way = 1; way < part->ways; way++)
			if (set[way].used < entry->used)
				entry = &set[way];
	}
	*entry = (struct kh_tlb_entry){
		.tag = tag,
		.used = ++tlb->clock,
		.level = level,
		.write = write,
	};
}

void kh_tlb_flush(struct kh_tlb *tlb)
{
	for (int i = 0; i < 2; i++)
		if (tlb->part[i].sets)
			memset(tlb->part[i].entries, 0,
			       (size_t)tlb->part[i].sets * tlb->part[i].ways *
				       sizeof(struct kh_tlb_entry));
}

void kh_tlb_flush_page(struct kh_tlb *tlb, uint64_t gfn)
{
	for (unsigned int level = 1; level <= 3; level++) {
		struct kh_tlb_entry *entry = find(tlb, gfn, level);

		if (entry)
			memset(entry, 0, sizeof(*entry));
	}
}
