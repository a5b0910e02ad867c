#include "coalesced.h"

uint32_t kh_coalesced_pending(struct kvm_coalesced_mmio_ring *ring, uint32_t n)
{
	/*
	 * Both must be indices below n; the page is shared, so other values are reduced modulo n.
	 */
	uint32_t last = __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE) % n;

	return (last + n - ring->first % n) % n;
}

int kh_coalesced_take(struct kvm_coalesced_mmio_ring *ring, uint32_t n,
		      struct kvm_coalesced_mmio *out)
{
	uint32_t first = ring->first % n;

	if (!kh_coalesced_pending(ring, n))
		return 0;
	*out = ring->coalesced_mmio[first];
	/* KVM may overwrite the entry from here on. */
	__atomic_store_n(&ring->first, (first + 1) % n, __ATOMIC_RELEASE);
	return 1;
}

uint32_t kh_coalesced_drain(struct kvm_coalesced_mmio_ring *ring, uint32_t n)
{
	uint32_t pending = kh_coalesced_pending(ring, n);

	__atomic_store_n(&ring->first, (ring->first + pending) % n, __ATOMIC_RELEASE);
	return pending;
}
