/* Compaction of the store: empty sparse chunks, a few records at a time. */
#include "pager_internal.h"

#define MOVES_AT_ONCE 64

int kh_pager_tidy_locked(struct kh_pager *pager)
{
	if (!kh_slab_is_sparse(&pager->store.slab))
		return 0;
	for (int i = 0; i < MOVES_AT_ONCE; i++) {
		int64_t slot = kh_slab_next_move(&pager->store.slab), index;

		if (slot < 0)
			return 0;
		/* Only the holder of evict_lock writes records: every record in use is complete. */
		index = kh_store_owner(&pager->store, slot);
		if (index < 0 || (uint64_t)index >= pager->n_pages)
			continue;
		kh_pager_lock_page(pager, index);
		if (kh_store_move(&pager->store, index, slot))
			COUNT(pager, moved_records);
		kh_pager_unlock_page(pager, index);
	}
	return 1;
}

int kh_pager_tidy(struct kh_pager *pager)
{
	int more;

	/* An eviction has priority, and compacts by itself if it needs the space. */
	if (pthread_mutex_trylock(&pager->evict_lock))
		return 0;
	more = kh_pager_tidy_locked(pager);
	pthread_mutex_unlock(&pager->evict_lock);
	return more;
}

void kh_pager_tidy_all(struct kh_pager *pager)
{
	int more = 1;

	while (more) {
		pthread_mutex_lock(&pager->evict_lock);
		more = kh_pager_tidy_locked(pager);
		pthread_mutex_unlock(&pager->evict_lock);
	}
}
