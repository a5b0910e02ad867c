/*
 * Host side of guest memory: mappings of a memfd, zapping, and residency by mincore
 * (pagemap: pagescan.h). Bitmaps are 64-bit words, bit 0 first.
 */
#ifndef KVMHOST_HOSTMEM_H
#define KVMHOST_HOSTMEM_H

#include "compat.h"

/* Map a memfd shared and writable at an address of the kernel's choice. */
int kh_map(int fd, uint64_t n_bytes, uint64_t *address);
/* The same at a multiple of 2 MiB, where huge pages are allowed. */
int kh_map_huge(int fd, uint64_t n_bytes, uint64_t *address);
/* Make huge pages of all of a mapping, which begins at a multiple of 2 MiB. */
int kh_collapse(uint64_t address, uint64_t n_bytes);
/* Map every page of a shared mapping, writable, as a touch would. */
int kh_populate(uint64_t address, uint64_t n_bytes);
int kh_unmap(uint64_t address, uint64_t n_bytes);

#define KH_ACCESS_NONE 0
#define KH_ACCESS_READ 1
#define KH_ACCESS_WRITE 2	/* and read */

/* Set what a mapping permits; secondary MMUs see an invalidation. */
int kh_protect(uint64_t address, uint64_t n_bytes, int access);
/* Unmap, and keep the addresses: nothing else is mapped there, and any access faults. */
int kh_vacate(uint64_t address, uint64_t n_bytes);
/* Undo kh_vacate: map the memfd from an offset on, shared and writable. */
int kh_remap(int fd, uint64_t offset, uint64_t n_bytes, uint64_t address);

/*
 * Zap the host PTEs of [address, address + n_pages * 4096). The data stays in the
 * memfd; secondary MMUs see an invalidation. With words only the runs of set bits
 * are zapped; a gap of up to gap_pages clear bits inside a run is zapped with it.
 * Returns the number of madvise calls.
 */
int64_t kh_zap(uint64_t address, uint64_t n_pages, const uint64_t *words, uint64_t gap_pages);

/*
 * Copy bytes out of (or, with write, into) a mapping of this process as a vCPU
 * would access it: an evicted page is faulted in, and the resident limit applies.
 * Returns -EFAULT for a page that cannot be faulted in, where a direct access would
 * raise a signal.
 */
int kh_guest_copy(uint64_t address, uint8_t *buffer, uint64_t n_bytes, int write);

/* Punch a hole into a memfd: the range reads as zeros and uses no memory. */
int kh_punch(int fd, uint64_t offset, uint64_t n_bytes);

/*
 * Set the bit of every page of [offset, offset + n_pages * 4096) that a memfd holds,
 * in memory or in swap, by SEEK_DATA.
 */
int kh_held(int fd, uint64_t offset, uint64_t n_pages, uint64_t *words);

/* Set the bit of every page that is in memory, by mincore on a mapping: not in swap. */
int kh_resident(uint64_t address, uint64_t n_pages, uint64_t *words);

#endif
