#include "dirtyring.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define PAGE_BYTES 4096

struct ring {
	struct kvm_dirty_gfn *entries;
	uint32_t next;		/* first entry that has not been collected yet */
};

struct slot {
	uint64_t n_pages;
	uint64_t *dirty;
};

/*
 * The lock covers the collection of entries, the reset that write-protects their
 * pages again, and the bitmaps: therefore a page whose bit is cleared is always
 * protected, and its next write makes a new entry.
 */
struct kh_rings {
	int vm_fd;
	uint32_t n_entries;
	pthread_mutex_t lock;
	uint32_t n_rings;
	uint32_t n_slots;
	struct ring rings[KH_RING_VCPUS];
	struct slot slots[KH_RING_SLOTS];
	struct kh_ring_counts counts;
};

struct kh_rings *kh_rings_new(int vm_fd, uint32_t n_entries)
{
	struct kh_rings *rings = calloc(1, sizeof(*rings));

	if (!rings)
		return NULL;
	rings->vm_fd = vm_fd;
	rings->n_entries = n_entries;
	pthread_mutex_init(&rings->lock, NULL);
	return rings;
}

int kh_rings_add_slot(struct kh_rings *rings, uint64_t n_pages)
{
	uint64_t *dirty;

	if (rings->n_slots == KH_RING_SLOTS)
		return -ENOSPC;
	dirty = calloc((n_pages + 63) / 64, sizeof(*dirty));
	if (!dirty)
		return -ENOMEM;
	rings->slots[rings->n_slots++] = (struct slot){ n_pages, dirty };
	return 0;
}

int kh_rings_add_vcpu(struct kh_rings *rings, int vcpu_fd)
{
	uint64_t n_bytes = rings->n_entries * sizeof(struct kvm_dirty_gfn);
	void *entries;

	if (rings->n_rings == KH_RING_VCPUS)
		return -ENOSPC;
	entries = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd,
		       (off_t)KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_BYTES);
	if (entries == MAP_FAILED)
		return -errno;
	rings->rings[rings->n_rings++] = (struct ring){ .entries = entries };
	return 0;
}

static void note(struct kh_rings *rings, const struct kvm_dirty_gfn *entry)
{
	/* The upper half of the slot is the address space: 1 is SMM's. */
	struct slot *slot = entry->slot < rings->n_slots ? &rings->slots[entry->slot] : NULL;

	rings->counts.entries++;
	if (slot && entry->offset < slot->n_pages)
		slot->dirty[entry->offset / 64] |= 1ull << entry->offset % 64;
	else
		rings->counts.foreign++;
}

static uint64_t drain(struct kh_rings *rings, struct ring *ring)
{
	uint64_t taken = 0;

	for (;; taken++) {
		struct kvm_dirty_gfn *entry = &ring->entries[ring->next & (rings->n_entries - 1)];

		/* Pairs with KVM's release: slot and offset are visible before the flag. */
		if (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
			return taken;
		note(rings, entry);
		__atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
		ring->next++;
	}
}

static int64_t collect_locked(struct kh_rings *rings)
{
	int64_t taken = 0;

	for (uint32_t i = 0; i < rings->n_rings; i++)
		taken += drain(rings, &rings->rings[i]);
	if (!taken)
		return 0;
	/*
	 * Repeat after a signal: since v6.16 a signal interrupts the reset, and the
	 * pages of entries that are not reset are not write-protected.
	 */
	while (ioctl(rings->vm_fd, KVM_RESET_DIRTY_RINGS, 0) < 0)
		if (errno != EINTR)
			return -errno;
	rings->counts.resets++;
	return taken;
}

int64_t kh_rings_collect(struct kh_rings *rings)
{
	int64_t result;

	pthread_mutex_lock(&rings->lock);
	result = collect_locked(rings);
	pthread_mutex_unlock(&rings->lock);
	return result;
}

int64_t kh_rings_on_full(struct kh_rings *rings)
{
	int64_t result;

	pthread_mutex_lock(&rings->lock);
	rings->counts.full++;
	result = collect_locked(rings);
	pthread_mutex_unlock(&rings->lock);
	return result;
}

static void take(struct slot *slot, uint64_t first, uint64_t n_pages, int clear,
		 const uint64_t *mask, uint64_t *words)
{
	for (uint64_t i = 0; i < n_pages; i++) {
		uint64_t page = first + i, bit = 1ull << page % 64;
		uint64_t word = slot->dirty[page / 64];

		if (!(word & bit)) {
			/* No bit in the rest of this word: continue with the next one. */
			if (!(word >> page % 64))
				i += 63 - page % 64;
			continue;
		}
		words[i / 64] |= 1ull << i % 64;
		if (clear && (!mask || mask[i / 64] >> i % 64 & 1))
			slot->dirty[page / 64] = word & ~bit;
	}
}

int kh_rings_harvest(struct kh_rings *rings, uint32_t slot, uint64_t first, uint64_t n_pages,
		     int clear, const uint64_t *mask, uint64_t *words)
{
	int64_t result;

	if (slot >= rings->n_slots || first > rings->slots[slot].n_pages ||
	    n_pages > rings->slots[slot].n_pages - first)
		return -ERANGE;
	pthread_mutex_lock(&rings->lock);
	result = collect_locked(rings);
	if (result >= 0)
		take(&rings->slots[slot], first, n_pages, clear, mask, words);
	pthread_mutex_unlock(&rings->lock);
	return result < 0 ? (int)result : 0;
}

int kh_rings_forget(struct kh_rings *rings)
{
	int64_t result;

	pthread_mutex_lock(&rings->lock);
	result = collect_locked(rings);
	for (uint32_t i = 0; i < rings->n_slots; i++)
		memset(rings->slots[i].dirty, 0, (rings->slots[i].n_pages + 63) / 64 * 8);
	pthread_mutex_unlock(&rings->lock);
	return result < 0 ? (int)result : 0;
}

void kh_rings_counts(struct kh_rings *rings, struct kh_ring_counts *counts)
{
	pthread_mutex_lock(&rings->lock);
	*counts = rings->counts;
	pthread_mutex_unlock(&rings->lock);
}

void kh_rings_free(struct kh_rings *rings)
{
	if (!rings)
		return;
	for (uint32_t i = 0; i < rings->n_rings; i++)
		munmap(rings->rings[i].entries, rings->n_entries * sizeof(struct kvm_dirty_gfn));
	for (uint32_t i = 0; i < rings->n_slots; i++)
		free(rings->slots[i].dirty);
	pthread_mutex_destroy(&rings->lock);
	free(rings);
}
