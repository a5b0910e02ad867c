/* What one process may do to the mappings of another. */
#ifndef KVMHOST_FOREIGN_H
#define KVMHOST_FOREIGN_H

#include "compat.h"

/*
 * Take pages out of the page table of another process, by process_madvise(2) with
 * MADV_PAGEOUT: those of words (NULL: all n_pages) from its address on. What backs them
 * stays, unless the host has swap. The kernel passes over pages that it cannot
 * take, silently: look afterwards. Returns 0 or -errno: EPERM without CAP_SYS_NICE,
 * ESRCH if the process has ended, ENOMEM if nothing is mapped in a part of the range.
 */
int kh_foreign_pageout(int pidfd, uint64_t address, uint64_t n_pages, const uint64_t *words);

#endif
