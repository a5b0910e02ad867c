/*
 * Guest memory in chunks, for snapshots: reading it while the pager is frozen, from the
 * memfd and from the store, and filling it again. Nothing here faults a page in and
 * nothing instantiates a hole.
 *
 * A chunk is up to KH_CHUNK_PAGES neighbouring pages of one region. Pages that are all
 * zero are left out; the others lie packed, in ascending order.
 */
#ifndef KVMHOST_CHUNK_H
#define KVMHOST_CHUNK_H

#include "compat.h"
#include "pager.h"

#define KH_CHUNK_PAGES 256
#define KH_CHUNK_WORDS 4

struct kh_chunk {
	uint64_t held[4];	/* bitmap: pages that are not zero */
	uint32_t n_held;
	uint32_t crc;		/* CRC-32C of the packed pages; 0 if there are none */
};

/* CRC-32C (Castagnoli), as in RFC 3720; 0 for no bytes. */
uint32_t kh_crc32c(const void *data, uint64_t n_bytes);
/* The same without the processor's instruction, for tests. */
uint32_t kh_crc32c_by_tables(const void *data, uint64_t n_bytes);

/*
 * Until the thaw no thread evicts, drops or restores pages or changes the limit; a
 * thread that tries blocks. Faults are served, so that a thread of the VMM that
 * touches guest memory never waits for the freezer: such a page moves to the memfd,
 * under its lock, and its contents do not change. Freezes nest.
 */
void kh_pager_freeze(struct kh_pager *pager);
void kh_pager_thaw(struct kh_pager *pager);

/*
 * Read a chunk: n_pages from a page of the memfd on, which is page index of the pager.
 * pager may be NULL: then all is in the memfd. data takes n_pages pages. 0 or -errno;
 * *bad is the first page, from the chunk's first on, that could not be read: -EBADMSG
 * if it is lost or not what was stored, -EIO if it cannot be read.
 */
int kh_chunk_read(struct kh_pager *pager, int memfd, uint64_t page, uint64_t index,
		  uint32_t n_pages, struct kh_chunk *chunk, void *data, uint32_t *bad);

/*
 * Restore a chunk into empty memory: chunk->held has the bit of each page that data
 * contains. With an armed pager at most room_pages of them become resident, the
 * others go to the store; pinned pages are always resident, and the caller has made
 * room for them. Returns how many became resident and are not pinned, or -errno:
 * -EINVAL if *bad is a page that is all zero, -ENOSPC if the store is full.
 */
int kh_chunk_fill(struct kh_pager *pager, int memfd, uint64_t page, uint64_t index,
		  uint32_t n_pages, const struct kh_chunk *chunk, const void *data,
		  uint64_t room_pages, uint32_t *bad);

/*
 * Start writeback of a range of a file; wait for the writeback of the pages before it, and
 * drop those from the page cache. 0 or -errno.
 */
int kh_write_behind(int fd, uint64_t offset, uint64_t n_bytes, uint64_t distance);

#endif
