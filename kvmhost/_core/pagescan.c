#include "pagescan.h"

#include "hostmem.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PAGE_SHIFT 12
#define CHUNK_PAGES 8192
/* A PMD's worth: no huge page that matters here is larger (1 GiB ones are not offered). */
#define HUGE_PAGES 512ull

struct kh_scanner {
	struct page_region *regions;
	uint64_t n_regions;
	uint64_t max_regions;
	uint64_t calls;
};

struct kh_scanner *kh_scanner_new(uint64_t start_regions, uint64_t max_regions)
{
	struct kh_scanner *scanner = calloc(1, sizeof(*scanner));

	if (!scanner || !start_regions)
		goto fail;
	scanner->n_regions = start_regions;
	scanner->max_regions = max_regions > start_regions ? max_regions : start_regions;
	scanner->regions = malloc(start_regions * sizeof(*scanner->regions));
	if (scanner->regions)
		return scanner;
fail:
	free(scanner);
	return NULL;
}

void kh_scanner_free(struct kh_scanner *scanner)
{
	if (!scanner)
		return;
	free(scanner->regions);
	free(scanner);
}

uint64_t kh_scanner_regions(const struct kh_scanner *scanner)
{
	return scanner->n_regions;
}

uint64_t kh_scanner_calls(const struct kh_scanner *scanner)
{
	return scanner->calls;
}

/* Double the buffer. Without memory it stays as it is: the scan takes more calls. */
static void grow(struct kh_scanner *scanner)
{
	uint64_t wanted = scanner->n_regions * 2;
	struct page_region *regions;

	if (wanted > scanner->max_regions)
		wanted = scanner->max_regions;
	if (wanted == scanner->n_regions)
		return;
	regions = realloc(scanner->regions, wanted * sizeof(*regions));
	if (!regions)
		return;
	scanner->regions = regions;
	scanner->n_regions = wanted;
}

static void set_run(uint64_t *words, uint64_t start, uint64_t end)
{
	if (end - start == 1) {
		words[start / 64] |= 1ull << start % 64;
		return;
	}
	while (start < end) {
		uint64_t bit = start % 64, n = 64 - bit < end - start ? 64 - bit : end - start;

		words[start / 64] |= (n == 64 ? ~0ull : (1ull << n) - 1) << bit;
		start += n;
	}
}

static int note_region(const struct page_region *region, uint64_t address,
		       const struct kh_page_bits *bits)
{
	uint64_t start = (region->start - address) >> PAGE_SHIFT;
	uint64_t end = (region->end - address) >> PAGE_SHIFT;
	int found = 0;

	if (region->categories & PAGE_IS_PRESENT) {
		found |= KH_PAGES_PRESENT;
		if (bits->present)
			set_run(bits->present, start, end);
		if (region->categories & PAGE_IS_HUGE) {
			found |= KH_PAGES_HUGE;
			if (bits->huge)
				set_run(bits->huge, start, end);
		}
	} else if (region->categories & PAGE_IS_SWAPPED) {
		found |= KH_PAGES_SWAPPED;
		if (bits->swapped)
			set_run(bits->swapped, start, end);
	}
	return found;
}

/*
 * Walk [start, end) of a prepared request. A full buffer ends a call early and
 * walk_end is where to continue: no region is lost, for any size of the buffer.
 */
static int scan_all(struct kh_scanner *scanner, int fd, struct pm_scan_arg *arg,
		    const struct kh_page_bits *bits)
{
	uint64_t address = arg->start;
	int found = 0;

	while (arg->start < arg->end) {
		int n;

		arg->vec = (uintptr_t)scanner->regions;
		arg->vec_len = scanner->n_regions;
		n = ioctl(fd, PAGEMAP_SCAN, arg);
		scanner->calls++;
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		for (int i = 0; i < n; i++)
			found |= note_region(&scanner->regions[i], address, bits);
		/* Not at the end with room left: the kernel would not make progress. */
		if (arg->walk_end <= arg->start)
			return -EIO;
		arg->start = arg->walk_end;
		if ((uint64_t)n == scanner->n_regions)
			grow(scanner);
	}
	return found;
}

int kh_scanner_scan(struct kh_scanner *scanner, int pagemap_fd, uint64_t address,
		    uint64_t n_pages, const struct kh_page_bits *bits)
{
	uint64_t any = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
	struct pm_scan_arg arg = {
		.size = sizeof(arg),
		.start = address,
		.end = address + (n_pages << PAGE_SHIFT),
		/* A test for one category is faster than a test for either of two. */
		.category_mask = bits->swapped ? 0 : PAGE_IS_PRESENT,
		.category_anyof_mask = bits->swapped ? any : 0,
		.return_mask = any | PAGE_IS_HUGE,
	};

	return scan_all(scanner, pagemap_fd, &arg, bits);
}

int kh_scanner_written(struct kh_scanner *scanner, int pagemap_fd, uint64_t address,
		       uint64_t n_pages, int clear, uint64_t *words)
{
	struct kh_page_bits bits = { .present = words, .swapped = words };
	struct pm_scan_arg arg = {
		.size = sizeof(arg),
		.start = address,
		.end = address + (n_pages << PAGE_SHIFT),
		.flags = (clear ? PM_SCAN_WP_MATCHING : 0) | PM_SCAN_CHECK_WPASYNC,
		.category_mask = PAGE_IS_WRITTEN,
		.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
		.return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
	};

	return scan_all(scanner, pagemap_fd, &arg, &bits);
}

int kh_pagemap_scan(int pagemap_fd, uint64_t address, uint64_t n_pages, uint64_t *words)
{
	struct kh_page_bits bits = { .present = words };
	struct kh_scanner *scanner = kh_scanner_new(512, 1024);
	int found;

	if (!scanner)
		return -ENOMEM;
	found = kh_scanner_scan(scanner, pagemap_fd, address, n_pages, &bits);
	kh_scanner_free(scanner);
	return found < 0 ? found : 0;
}

int kh_pagemap_decode(const uint64_t *entries, uint64_t first, uint64_t n,
		      const struct kh_page_bits *bits)
{
	int found = 0;

	for (uint64_t i = 0; i < n; i++) {
		uint64_t word = (first + i) / 64, bit = 1ull << (first + i) % 64;

		if (entries[i] & KH_PAGEMAP_PRESENT) {
			found |= KH_PAGES_PRESENT;
			if (bits->present)
				bits->present[word] |= bit;
		} else if (entries[i] & KH_PAGEMAP_SWAPPED) {
			found |= KH_PAGES_SWAPPED;
			if (bits->swapped)
				bits->swapped[word] |= bit;
		}
	}
	return found;
}

static int decode_soft_dirty(const uint64_t *entries, uint64_t first, uint64_t n,
			     const struct kh_page_bits *bits)
{
	for (uint64_t i = 0; i < n; i++)
		if (entries[i] & KH_PAGEMAP_SOFT_DIRTY)
			bits->present[(first + i) / 64] |= 1ull << (first + i) % 64;
	return 0;
}

static int read_all(int fd, uint64_t address, uint64_t n_pages, const struct kh_page_bits *bits,
		    int (*decode)(const uint64_t *, uint64_t, uint64_t,
				  const struct kh_page_bits *))
{
	uint64_t *entries = malloc(CHUNK_PAGES * sizeof(*entries));
	int found = 0;

	if (!entries)
		return -ENOMEM;
	for (uint64_t page = 0; page < n_pages;) {
		uint64_t n = n_pages - page < CHUNK_PAGES ? n_pages - page : CHUNK_PAGES;
		off_t offset = ((address >> PAGE_SHIFT) + page) * sizeof(*entries);
		ssize_t got = pread(fd, entries, n * sizeof(*entries), offset);

		if (got < 0 && errno == EINTR)
			continue;
		/* Nothing to read: the process has ended, or the range is none. */
		if (got < (ssize_t)sizeof(*entries)) {
			found = got < 0 ? -errno : -ESRCH;
			break;
		}
		n = got / sizeof(*entries);
		found |= decode(entries, page, n, bits);
		page += n;
	}
	free(entries);
	return found;
}

int kh_pagemap_read(int pagemap_fd, uint64_t address, uint64_t n_pages,
		    const struct kh_page_bits *bits)
{
	return read_all(pagemap_fd, address, n_pages, bits, kh_pagemap_decode);
}

int kh_pagemap_soft_dirty(int pagemap_fd, uint64_t address, uint64_t n_pages, uint64_t *words)
{
	struct kh_page_bits bits = { .present = words };

	return read_all(pagemap_fd, address, n_pages, &bits, decode_soft_dirty);
}

static int test_bit(const uint64_t *words, uint64_t bit)
{
	return words[bit / 64] >> (bit % 64) & 1;
}

/*
 * Widen what is to be zapped to whole huge pages, inside the range: hugetlb accepts
 * only whole pages, and the kernel drops the single entry of a huge page in any
 * case.
 */
static void widen(uint64_t address, uint64_t n_pages, const uint64_t *huge, uint64_t *chosen)
{
	uint64_t skew = (address >> PAGE_SHIFT) % HUGE_PAGES;

	for (uint64_t start = 0; start < n_pages;) {
		uint64_t end = start + HUGE_PAGES - (start + skew) % HUGE_PAGES;
		int any = 0;

		end = end < n_pages ? end : n_pages;
		for (uint64_t i = start; i < end && !any; i++)
			any = test_bit(huge, i) && test_bit(chosen, i);
		if (any)
			for (uint64_t i = start; i < end; i++)
				if (test_bit(huge, i))
					set_run(chosen, i, i + 1);
		start = end;
	}
}

static void clear_run(uint64_t *words, uint64_t start, uint64_t end)
{
	for (; start < end; start++)
		words[start / 64] &= ~(1ull << start % 64);
}

/* Zap whole the chosen huge pages that begin before the range or end after it. */
static int zap_edges(uint64_t address, uint64_t n_pages, const uint64_t *huge, uint64_t *chosen)
{
	uint64_t first = address >> PAGE_SHIFT, end = first + n_pages;
	uint64_t head = first - first % HUGE_PAGES, tail = end - end % HUGE_PAGES;
	int64_t calls = 0;

	if (head < first && test_bit(huge, 0) && test_bit(chosen, 0)) {
		uint64_t after = head + HUGE_PAGES - first;

		calls = kh_zap(head << PAGE_SHIFT, HUGE_PAGES, NULL, 0);
		clear_run(chosen, 0, after < n_pages ? after : n_pages);
	}
	if (calls >= 0 && tail < end && tail >= first && test_bit(huge, n_pages - 1) &&
	    test_bit(chosen, n_pages - 1)) {
		calls = kh_zap(tail << PAGE_SHIFT, HUGE_PAGES, NULL, 0);
		clear_run(chosen, tail - first, n_pages);
	}
	return calls < 0 ? (int)calls : 0;
}

static int zap_chosen(uint64_t address, uint64_t n_pages, const uint64_t *young,
		      const uint64_t *huge, int any_huge, const uint64_t *mask)
{
	uint64_t n_words = (n_pages + 63) / 64;
	uint64_t *chosen;
	int64_t result = 0;

	if (!mask && !any_huge) {
		result = kh_zap(address, n_pages, young, 0);
		return result < 0 ? (int)result : 0;
	}
	chosen = malloc(n_words * sizeof(*chosen));
	if (!chosen)
		return -ENOMEM;
	for (uint64_t i = 0; i < n_words; i++)
		chosen[i] = young[i] & (mask ? mask[i] : ~0ull);
	if (any_huge) {
		widen(address, n_pages, huge, chosen);
		result = zap_edges(address, n_pages, huge, chosen);
	}
	if (result >= 0)
		result = kh_zap(address, n_pages, chosen, 0);
	free(chosen);
	return result < 0 ? (int)result : 0;
}

int kh_scan_harvest(struct kh_scanner *scanner, int pagemap_fd, uint64_t address,
		    uint64_t n_pages, int clear, const uint64_t *mask, uint64_t *young,
		    uint64_t *coarse)
{
	struct kh_page_bits bits = { .present = young, .huge = coarse };
	int found = scanner ? kh_scanner_scan(scanner, pagemap_fd, address, n_pages, &bits)
			    : kh_pagemap_read(pagemap_fd, address, n_pages, &bits);
	int result;

	if (!clear || found < 0 || !(found & KH_PAGES_PRESENT))
		return found;
	result = zap_chosen(address, n_pages, young, coarse, found & KH_PAGES_HUGE, mask);
	return result < 0 ? result : found;
}
