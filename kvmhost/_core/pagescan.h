/*
 * The page table state of a mapping: which pages are present, which are swapped,
 * which are mapped huge. Read from /proc/PID/pagemap, by PAGEMAP_SCAN or by plain
 * reads. Bitmaps are 64-bit words, bit 0 first; NULL omits a bitmap.
 */
#ifndef KVMHOST_PAGESCAN_H
#define KVMHOST_PAGESCAN_H

#include "compat.h"

/* The bits of a pagemap entry, Documentation/admin-guide/mm/pagemap.rst. */
#define KH_PAGEMAP_PRESENT 0x8000000000000000
#define KH_PAGEMAP_SWAPPED 0x4000000000000000
#define KH_PAGEMAP_SOFT_DIRTY 0x0080000000000000

/* What to look for, and what a scan found: bits of both. */
#define KH_PAGES_PRESENT 1
#define KH_PAGES_HUGE 2
#define KH_PAGES_SWAPPED 4

struct kh_page_bits {
	uint64_t *present;
	uint64_t *huge;		/* of those: mapped by an entry above the last level */
	uint64_t *swapped;	/* swap entries, and the markers that userfaultfd leaves */
};

/* A scan's buffer. It grows as calls fill it; not safe for concurrent use. */
struct kh_scanner;

/*
 * start_regions and max_regions: runs of pages that the buffer holds, 24 bytes each.
 * NULL: out of memory, or start_regions is 0.
 */
struct kh_scanner *kh_scanner_new(uint64_t start_regions, uint64_t max_regions);
void kh_scanner_free(struct kh_scanner *scanner);
/* Regions the buffer holds now, and PAGEMAP_SCAN calls so far. */
uint64_t kh_scanner_regions(const struct kh_scanner *scanner);
uint64_t kh_scanner_calls(const struct kh_scanner *scanner);

/*
 * Set the bits of n_pages from address on, by PAGEMAP_SCAN. Bitmaps must be zero at
 * entry. Returns KH_PAGES_* of what was found, or -errno (ENOTTY: no such call).
 */
int kh_scanner_scan(struct kh_scanner *scanner, int pagemap_fd, uint64_t address,
		    uint64_t n_pages, const struct kh_page_bits *bits);
/* The same by reading 8 bytes a page; huge mappings do not show. */
int kh_pagemap_read(int pagemap_fd, uint64_t address, uint64_t n_pages,
		    const struct kh_page_bits *bits);
/* Decode entries that were read already, as bits [first, first + n). */
int kh_pagemap_decode(const uint64_t *entries, uint64_t first, uint64_t n,
		      const struct kh_page_bits *bits);
/* Set the bit of every present page; a scan with a buffer of its own. */
int kh_pagemap_scan(int pagemap_fd, uint64_t address, uint64_t n_pages, uint64_t *words);
/*
 * Set the bit of every page written since the last call, and begin anew for those of
 * them. Only for ranges whose owner has them write-protected by an asynchronous
 * userfaultfd; EPERM elsewhere. Without clear nothing changes.
 */
int kh_scanner_written(struct kh_scanner *scanner, int pagemap_fd, uint64_t address,
		       uint64_t n_pages, int clear, uint64_t *words);
/* Set the bit of every page whose soft-dirty bit is set. */
int kh_pagemap_soft_dirty(int pagemap_fd, uint64_t address, uint64_t n_pages, uint64_t *words);

/*
 * One harvest of a mapping of this process: find the present pages (by scan, or by
 * reading with scanner NULL) and with clear zap those that are in mask (NULL: all). A
 * huge one is zapped whole if any of its pages is to be. young and coarse must be zero
 * at entry. Returns KH_PAGES_* of what was found, or -errno.
 */
int kh_scan_harvest(struct kh_scanner *scanner, int pagemap_fd, uint64_t address,
		    uint64_t n_pages, int clear, const uint64_t *mask, uint64_t *young,
		    uint64_t *coarse);

#endif
