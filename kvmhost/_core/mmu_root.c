/* Roots, and the life of table pages. */
#include "mmu_internal.h"

#include <stdlib.h>

uint64_t *kh_table_alloc(struct kh_mmu *mmu, unsigned int level)
{
	return kh_arena_alloc(mmu->arena, kh_table_bytes(&mmu->fmt, level));
}

void kh_table_free(struct kh_mmu *mmu, uint64_t *table, unsigned int level)
{
	kh_arena_free(mmu->arena, table, kh_table_bytes(&mmu->fmt, level));
}

static void free_retired_table(void *owner, void *table, uint64_t n_bytes)
{
	struct kh_mmu *mmu = owner;

	kh_arena_free(mmu->arena, table, n_bytes);
}

void kh_table_retire(struct kh_mmu *mmu, uint64_t *table, unsigned int level)
{
	kh_epoch_retire(&mmu->epoch, table, kh_table_bytes(&mmu->fmt, level), free_retired_table);
}

uint64_t kh_leaf_remove(struct kh_mmu *mmu, uint64_t *entry, unsigned int level, uint64_t left)
{
	/* An exchange: hardware and harvests change the entry until this moment. */
	uint64_t old = __atomic_exchange_n(entry, left, __ATOMIC_SEQ_CST);

	if (kh_leaf(&mmu->fmt, old, level) && kh_young(&mmu->fmt, old))
		kh_count(&mmu->counters.dropped_young, 1);
	return old;
}

/* Entries are left frozen, so that a concurrent fault cannot add to them. */
void kh_table_remove(struct kh_mmu *mmu, uint64_t *table, unsigned int level)
{
	const struct kh_format *fmt = &mmu->fmt;

	for (uint64_t i = 0; i < 1ull << fmt->bits[level]; i++) {
		uint64_t old = kh_leaf_remove(mmu, &table[i], level, fmt->raw_frozen);
		uint64_t *child = kh_table(fmt, old, level) ? kh_child(mmu, old, level) : NULL;

		if (child)
			kh_table_remove(mmu, child, level - 1);
	}
	kh_table_retire(mmu, table, level);
}

struct kh_root *kh_root_new(struct kh_mmu *mmu, uint32_t as_id)
{
	struct kh_root *root = calloc(1, sizeof(*root));

	if (!root)
		return NULL;
	root->table = kh_table_alloc(mmu, mmu->fmt.n_levels);
	if (!root->table) {
		free(root);
		return NULL;
	}
	root->pa = kh_arena_pa(mmu->arena, root->table);
	root->as_id = as_id;
	root->refcount = 1;
	pthread_mutex_lock(&mmu->roots_lock);
	root->next = mmu->roots;
	__atomic_store_n(&mmu->roots, root, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&mmu->roots_lock);
	return root;
}

struct kh_root *kh_root_current(struct kh_mmu *mmu, uint32_t as_id)
{
	struct kh_root *root;

	kh_for_each_root_lockless(mmu, root, as_id)
		if (!__atomic_load_n(&root->invalid, __ATOMIC_ACQUIRE))
			return root;
	return NULL;
}

bool kh_root_tryget(struct kh_root *root)
{
	uint32_t count = __atomic_load_n(&root->refcount, __ATOMIC_RELAXED);

	while (count)
		if (__atomic_compare_exchange_n(&root->refcount, &count, count + 1, true,
						__ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
			return true;
	return false;
}

static void free_root(void *owner, void *root, uint64_t argument)
{
	(void)owner;
	(void)argument;
	free(root);
}

static void unlink_root(struct kh_mmu *mmu, struct kh_root *root)
{
	pthread_mutex_lock(&mmu->roots_lock);
	for (struct kh_root **at = &mmu->roots; *at; at = &(*at)->next) {
		if (*at == root) {
			__atomic_store_n(at, root->next, __ATOMIC_SEQ_CST);
			break;
		}
	}
	pthread_mutex_unlock(&mmu->roots_lock);
}

void kh_root_put(struct kh_mmu *mmu, struct kh_root *root)
{
	if (__atomic_sub_fetch(&root->refcount, 1, __ATOMIC_ACQ_REL))
		return;
	unlink_root(mmu, root);
	kh_table_remove(mmu, root->table, mmu->fmt.n_levels);
	kh_epoch_retire(&mmu->epoch, root, 0, free_root);
}

int kh_mmu_invalidate_roots(struct kh_mmu *mmu)
{
	struct kh_root *fresh;
	int result = 0;

	kh_write_lock(&mmu->lock);
	for (uint32_t as_id = 0; as_id < mmu->n_as; as_id++) {
		struct kh_root *root = kh_root_current(mmu, as_id);

		fresh = mmu->released ? NULL : kh_root_new(mmu, as_id);
		if (!fresh && !mmu->released) {
			result = -ENOMEM;
			break;
		}
		if (root)
			__atomic_store_n(&root->invalid, true, __ATOMIC_SEQ_CST);
	}
	kh_unlock(&mmu->lock);
	/* vCPUs must leave the old roots: their next walk starts from a new one. */
	kh_mmu_flush_remote(mmu);
	return result;
}

static struct kh_root *first_invalid(struct kh_mmu *mmu)
{
	struct kh_root *root;

	pthread_mutex_lock(&mmu->roots_lock);
	for (root = mmu->roots; root; root = root->next)
		/*
		 * The zap that takes a root marks it as taken, so that two zaps never process the
		 * same root.
		 */
		if (__atomic_load_n(&root->invalid, __ATOMIC_ACQUIRE) && !root->zapping) {
			root->zapping = true;
			break;
		}
	pthread_mutex_unlock(&mmu->roots_lock);
	return root;
}

/*
 * The slow part, with the lock held for read: faults continue in the new roots.
 * This drops the reference that the root had while in use; a harvest that holds
 * another one keeps the root in the list until the harvest ends.
 */
int kh_mmu_zap_invalidated_roots(struct kh_mmu *mmu)
{
	struct kh_root *root;
	int n = 0;

	while ((root = first_invalid(mmu))) {
		kh_read_lock(&mmu->lock);
		kh_root_put(mmu, root);
		kh_unlock(&mmu->lock);
		n++;
	}
	kh_epoch_reclaim(&mmu->epoch);
	return n;
}

int kh_mmu_zap_all(struct kh_mmu *mmu)
{
	int result = kh_mmu_invalidate_roots(mmu);

	return result < 0 ? result : kh_mmu_zap_invalidated_roots(mmu);
}

int kh_mmu_release(struct kh_mmu *mmu)
{
	kh_write_lock(&mmu->lock);
	mmu->released = true;
	kh_unlock(&mmu->lock);
	return kh_mmu_zap_all(mmu);
}
