#include "mmu_epoch_internal.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

static uint32_t next_hint;
static _Thread_local uint32_t slot_hint;

void kh_epoch_init(struct kh_epoch *epoch, void *owner)
{
	memset(epoch, 0, sizeof(*epoch));
	epoch->now = 1;
	epoch->owner = owner;
	pthread_mutex_init(&epoch->lock, NULL);
}

void kh_epoch_destroy(struct kh_epoch *epoch)
{
	kh_epoch_synchronize(epoch);
	pthread_mutex_destroy(&epoch->lock);
	free(epoch->retired);
}

unsigned int kh_epoch_enter(struct kh_epoch *epoch)
{
	/* One slot per thread, while there are at most as many threads as slots. */
	if (slot_hint == 0)
		slot_hint = 1 + __atomic_fetch_add(&next_hint, 1, __ATOMIC_RELAXED);
	for (uint32_t slot = slot_hint;; slot++) {
		uint64_t empty = 0;
		uint64_t now = __atomic_load_n(&epoch->now, __ATOMIC_ACQUIRE);

		/* [publish] */
		if (__atomic_compare_exchange_n(&epoch->slots[slot % KH_EPOCH_SLOTS].epoch, &empty,
						now, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
			__atomic_thread_fence(__ATOMIC_SEQ_CST); /* [reader fence] */
			return slot % KH_EPOCH_SLOTS;
		}
		if (slot - slot_hint >= KH_EPOCH_SLOTS)
			sched_yield();
	}
}

/* The oldest epoch of any reader; everything retired before it can be freed. */
static uint64_t oldest_reader(struct kh_epoch *epoch)
{
	uint64_t oldest = UINT64_MAX;

	__atomic_thread_fence(__ATOMIC_SEQ_CST); /* [writer fence] */
	for (int i = 0; i < KH_EPOCH_SLOTS; i++) {
		/* [scan] */
		uint64_t seen = __atomic_load_n(&epoch->slots[i].epoch, __ATOMIC_SEQ_CST);

		if (seen && seen < oldest)
			oldest = seen;
	}
	return oldest;
}

static int push(struct kh_epoch *epoch, const struct kh_retired *entry)
{
	if (epoch->n_retired == epoch->size) {
		uint32_t size = epoch->size ? epoch->size * 2 : 256;
		struct kh_retired *grown = realloc(epoch->retired, size * sizeof(*grown));

		if (!grown)
			return -ENOMEM;
		epoch->retired = grown;
		epoch->size = size;
	}
	epoch->retired[epoch->n_retired++] = *entry;
	return 0;
}

/* Called with the lock held. */
static void reclaim_locked(struct kh_epoch *epoch)
{
	uint64_t oldest = oldest_reader(epoch);
	uint32_t kept = 0;

	for (uint32_t i = 0; i < epoch->n_retired; i++) {
		struct kh_retired *entry = &epoch->retired[i];

		if (entry->epoch < oldest) {
			entry->free(epoch->owner, entry->object, entry->argument);
			epoch->freed++;
		} else {
			epoch->retired[kept++] = *entry;
		}
	}
	epoch->n_retired = kept;
	__atomic_store_n(&epoch->waiting, kept, __ATOMIC_RELAXED);
}

void kh_epoch_reclaim(struct kh_epoch *epoch)
{
	pthread_mutex_lock(&epoch->lock);
	reclaim_locked(epoch);
	pthread_mutex_unlock(&epoch->lock);
}

void kh_epoch_retire(struct kh_epoch *epoch, void *object, uint64_t argument,
		     void (*release)(void *, void *, uint64_t))
{
	struct kh_retired entry = { .object = object, .argument = argument, .free = release };

	pthread_mutex_lock(&epoch->lock);
	entry.epoch = __atomic_fetch_add(&epoch->now, 1, __ATOMIC_SEQ_CST);
	if (push(epoch, &entry) < 0) {
		/* Out of memory for the list: wait for the readers instead. */
		while (oldest_reader(epoch) <= entry.epoch)
			sched_yield();
		release(epoch->owner, object, argument);
		epoch->freed++;
	}
	if (epoch->n_retired % KH_EPOCH_BACKLOG == 0 && epoch->n_retired)
		reclaim_locked(epoch);
	pthread_mutex_unlock(&epoch->lock);
}

void kh_epoch_synchronize(struct kh_epoch *epoch)
{
	uint64_t now = __atomic_fetch_add(&epoch->now, 1, __ATOMIC_SEQ_CST);

	while (oldest_reader(epoch) <= now) {
		__atomic_store_n(&epoch->waiting, UINT32_MAX, __ATOMIC_RELAXED);
		sched_yield();
	}
	kh_epoch_reclaim(epoch);
}
