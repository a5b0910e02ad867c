/* Operations on the mappings of another process. */
#ifndef KVMHOST_FOREIGN_H
#define KVMHOST_FOREIGN_H

#include "compat.h"

/*
 * Take pages out of the page table of another process, by process_madvise(2) with
 * MADV_PAGEOUT: those of words (NULL: all n_pages) from its address on. The backing
 * pages stay in memory, unless the host has swap. The kernel skips pages that it
 * cannot reclaim without an error: check the page table afterwards. Returns 0 or
 * -errno: EPERM without CAP_SYS_NICE, ESRCH if the process has ended, ENOMEM if
 * nothing is mapped in a part of the range.
 */
int kh_foreign_pageout(int pidfd, uint64_t address, uint64_t n_pages, const uint64_t *words);

#endif
