/*
 * The ring of coalesced writes: one page of struct kvm_coalesced_mmio_ring that KVM
 * appends to (last) and userspace takes from (first). n is the number of entries.
 */
#ifndef KVMHOST_COALESCED_H
#define KVMHOST_COALESCED_H

#include "compat.h"

/* Entries that are waiting. */
uint32_t kh_coalesced_pending(struct kvm_coalesced_mmio_ring *ring, uint32_t n);
/* Take the oldest entry out; 0 if there is none. */
int kh_coalesced_take(struct kvm_coalesced_mmio_ring *ring, uint32_t n,
		      struct kvm_coalesced_mmio *out);
/* Take all entries out; returns how many. */
uint32_t kh_coalesced_drain(struct kvm_coalesced_mmio_ring *ring, uint32_t n);

#endif
