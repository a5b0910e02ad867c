/*
 * KVM's dirty log under manual protection: fetch the bitmap, and clear exactly the
 * requested pages. Bitmaps are 64-bit words, bit 0 first.
 */
#ifndef KVMHOST_DIRTYLOG_H
#define KVMHOST_DIRTYLOG_H

#include "compat.h"

/*
 * Set bit i of words for each page first + i of a slot that was written, for n_pages.
 * With clear those of mask (NULL: all) are cleared and write-protected again. words
 * is overwritten. room: as many words as the whole slot has, for ranges that are
 * a part of it and for masks; may be NULL where neither is asked. Returns 0 or -errno.
 */
int kh_dirty_harvest(int vm_fd, uint32_t slot, uint64_t slot_pages, uint64_t first,
		     uint64_t n_pages, int clear, const uint64_t *mask, uint64_t *words,
		     uint64_t *room);

#endif
