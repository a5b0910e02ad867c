/*
 * The kernel's files of 64-bit words that are indexed by page: pagemap by virtual
 * page, page_idle/bitmap by word of 64 pfns, kpageflags by pfn.
 */
#ifndef KVMHOST_IDLEPAGE_H
#define KVMHOST_IDLEPAGE_H

#include "compat.h"

/*
 * The pfn of each page of a mapping, 0 where none is present. EPERM where the
 * kernel hides pfns (no CAP_SYS_ADMIN).
 */
int kh_pagemap_pfns(int pagemap_fd, uint64_t address, uint64_t n_pages, uint64_t *pfns);
/*
 * Read or write the words of ascending indexes; adjacent words use one call. A word
 * beyond the end of the file reads as 0.
 */
int kh_words_read(int fd, const uint64_t *indexes, uint64_t n, uint64_t *words);
int kh_words_write(int fd, const uint64_t *indexes, uint64_t n, const uint64_t *words);

#endif
