/*
 * Epoch-based reclamation, in place of RCU in KVM.
 *
 * A reader publishes the epoch in which it entered. A thread that unlinks an object
 * retires it with the current epoch and advances the epoch; the object is freed
 * once every reader that is still inside entered later. Two full fences make this
 * sound, one between a reader's store to its slot and its loads, one between the
 * unlinking store and the loads of the slots: either the reclaimer sees the slot,
 * or the reader sees that the entry was unlinked. Without the reader's fence, C11
 * allows its acquire loads to be reordered before the store of its slot, and so do
 * arm64 and powerpc; on x86 the compare-and-swap is itself a full fence. The steps
 * in brackets are those of the model in kvmhost/mmu/epochs.py.
 */
#ifndef KVMHOST_MMU_EPOCH_INTERNAL_H
#define KVMHOST_MMU_EPOCH_INTERNAL_H

#include "compat.h"

#include <pthread.h>
#include <stdbool.h>

#define KH_EPOCH_SLOTS 128
#define KH_EPOCH_BACKLOG 64

struct kh_retired {
	uint64_t epoch;
	void *object;
	uint64_t argument;
	void (*free)(void *owner, void *object, uint64_t argument);
};

struct kh_epoch {
	_Alignas(64) uint64_t now; /* from 1: 0 marks an empty slot */
	_Alignas(64) struct {
		uint64_t epoch;
		uint64_t pad[7];
	} slots[KH_EPOCH_SLOTS];
	pthread_mutex_t lock; /* the list below */
	struct kh_retired *retired;
	uint32_t n_retired;
	uint32_t size;
	uint32_t waiting;     /* retired objects that a reader keeps from being freed */
	void *owner;
	uint64_t freed;
};

void kh_epoch_init(struct kh_epoch *epoch, void *owner);
void kh_epoch_destroy(struct kh_epoch *epoch);
unsigned int kh_epoch_enter(struct kh_epoch *epoch);
/* Free `object` when every current reader has left; never blocks. */
void kh_epoch_retire(struct kh_epoch *epoch, void *object, uint64_t argument,
		     void (*free)(void *, void *, uint64_t));
void kh_epoch_reclaim(struct kh_epoch *epoch);
/* Wait until every current reader has left; not from inside an epoch. */
void kh_epoch_synchronize(struct kh_epoch *epoch);

static inline void kh_epoch_exit(struct kh_epoch *epoch, unsigned int slot)
{
	__atomic_store_n(&epoch->slots[slot].epoch, 0, __ATOMIC_RELEASE);
}

/* True if enough retired objects are pending that a long walk should leave its epoch briefly. */
static inline bool kh_epoch_wanted(struct kh_epoch *epoch)
{
	return __atomic_load_n(&epoch->waiting, __ATOMIC_RELAXED) >= KH_EPOCH_BACKLOG;
}

#endif
