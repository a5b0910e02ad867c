#ifndef KVMHOST_MMU_RADIX_INTERNAL_H
#define KVMHOST_MMU_RADIX_INTERNAL_H

#include "compat.h"

#include "mmu_internal.h"

/*
 * The last-level entry or leaf for a gfn, or NULL for a hole. *shift is the size of
 * the leaf, or of the hole, in every case; *level is its level.
 */
uint64_t *kh_radix_find(const struct kh_mmu *mmu, const struct kh_root *root, uint64_t gfn,
			unsigned int *shift, unsigned int *level, struct kh_descent *descent);

#endif
