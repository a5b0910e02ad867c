/*
 * The ring of coalesced writes: one page of struct kvm_coalesced_mmio_ring that KVM
 * appends to (last) and userspace takes from (first). n is the number of entries.
 */
#ifndef KVMHOST_COALESCED_H
#define KVMHOST_COALESCED_H

#include "compat.h"

/* Number of pending entries. */
uint32_t kh_coalesced_pending(struct kvm_coalesced_mmio_ring *ring, uint32_t n);
/* Remove the oldest entry; returns 0 if the ring is empty. */
int kh_coalesced_take(struct kvm_coalesced_mmio_ring *ring, uint32_t n,
		      struct kvm_coalesced_mmio *out);
/* Remove all entries; returns their number. */
uint32_t kh_coalesced_drain(struct kvm_coalesced_mmio_ring *ring, uint32_t n);

#endif
