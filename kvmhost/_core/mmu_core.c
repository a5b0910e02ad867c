#include "mmu_internal.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

void kh_rwlock_init(struct kh_rwlock *lock)
{
	memset(lock, 0, sizeof(*lock));
	/*
	 * glibc's default kind: waiting readers enter when a writer leaves, and a
	 * writer when all readers have left. The kernel's lock is a queue, which is
	 * closer to this than the kind that prefers writers: with that kind, a
	 * writer in a loop starves the readers.
	 */
	pthread_rwlock_init(&lock->lock, NULL);
}

/* How often a waiter polls before it sleeps, about 20 us: the kernel's lock spins. */
#define SPINS 1000

static void wait_for(struct kh_rwlock *lock, int (*try)(pthread_rwlock_t *),
		     int (*wait)(pthread_rwlock_t *))
{
	uint64_t start = now_ns();
	int spins = 0;

	while (spins < SPINS && try(&lock->lock)) {
		spins++;
#if defined(__x86_64__)
		__builtin_ia32_pause();
#endif
	}
	if (spins == SPINS)
		wait(&lock->lock);
	__atomic_fetch_add(&lock->waits, 1, __ATOMIC_RELAXED);
	__atomic_fetch_add(&lock->wait_ns, now_ns() - start, __ATOMIC_RELAXED);
}

void kh_read_lock(struct kh_rwlock *lock)
{
	if (pthread_rwlock_tryrdlock(&lock->lock))
		wait_for(lock, pthread_rwlock_tryrdlock, pthread_rwlock_rdlock);
}

void kh_write_lock(struct kh_rwlock *lock)
{
	if (pthread_rwlock_trywrlock(&lock->lock))
		wait_for(lock, pthread_rwlock_trywrlock, pthread_rwlock_wrlock);
}

static bool regions_ok(const struct kh_region *regions, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		const struct kh_region *region = &regions[i];

		if (region->pa_start % 4096 || region->host_address % 4096 ||
		    region->pa_start + region->n_bytes < region->pa_start)
			return false;
	}
	return true;
}

static struct kh_mmu *mmu_alloc(const struct kh_mmu_config *config, int *result)
{
	struct kh_mmu *mmu = aligned_alloc(64, (sizeof(*mmu) + 63) / 64 * 64);

	if (!mmu) {
		*result = -ENOMEM;
		return NULL;
	}
	memset(mmu, 0, sizeof(*mmu));
	*result = kh_format_init(&mmu->fmt, config);
	if (*result < 0) {
		free(mmu);
		return NULL;
	}
	mmu->flags = config->flags;
	/* x86 compares the range; arm64 and powerpc only the count and the sequence. */
	mmu->range_retry = config->flags & KH_MMU_RANGE_RETRY ||
			   (!(config->flags & KH_MMU_PLAIN_RETRY) &&
			    (config->format == KH_FMT_NPT || config->format == KH_FMT_EPT));
	mmu->n_as = config->n_as ? config->n_as : 1;
	kh_epoch_init(&mmu->epoch, mmu);
	kh_rwlock_init(&mmu->lock);
	pthread_mutex_init(&mmu->roots_lock, NULL);
	return mmu;
}

/* An arena is the only region of its table memory. */
static int add_arena(struct kh_mmu *mmu, const struct kh_mmu_config *config)
{
	uint64_t pa = config->arena_pa ? config->arena_pa : 1ull << 32;
	uint64_t n_bytes = config->arena_bytes ? config->arena_bytes : 64ull << 20;
	int result;

	if (pa % 65536 || n_bytes % 65536 || pa + n_bytes > mmu->fmt.table_mask ||
	    pa + n_bytes < pa)
		return -EINVAL;
	result = kh_arena_open(&mmu->arena, pa, n_bytes, mmu->flags & KH_MMU_POISON);
	if (result < 0)
		return result;
	mmu->memory.regions = malloc(sizeof(*mmu->memory.regions));
	if (!mmu->memory.regions)
		return -ENOMEM;
	mmu->memory.n_regions = 1;
	mmu->memory.regions[0] = (struct kh_region){
		.pa_start = pa,
		.host_address = (uint64_t)(uintptr_t)mmu->arena->base,
		.n_bytes = n_bytes,
	};
	return 0;
}

int kh_mmu_open(struct kh_mmu **out, const struct kh_mmu_config *config)
{
	struct kh_mmu *mmu;
	int result;

	mmu = mmu_alloc(config, &result);
	if (!mmu)
		return result;
	result = add_arena(mmu, config);
	for (uint32_t as_id = 0; !result && as_id < mmu->n_as; as_id++)
		result = kh_root_new(mmu, as_id) ? 0 : -ENOMEM;
	if (result < 0) {
		kh_mmu_close(mmu);
		return result;
	}
	*out = mmu;
	return 0;
}

static int add_live_root(struct kh_mmu *mmu, uint64_t root_pa)
{
	uint64_t n_bytes = kh_table_bytes(&mmu->fmt, mmu->fmt.n_levels);
	struct kh_root *root = calloc(1, sizeof(*root));

	if (!root)
		return -ENOMEM;
	root->pa = root_pa;
	root->refcount = 1;
	root->table = root_pa % 4096 ? NULL : kh_memory_host(&mmu->memory, root_pa, n_bytes);
	mmu->roots = root;
	return root->table ? 0 : -EFAULT;
}

int kh_mmu_open_live(struct kh_mmu **out, const struct kh_mmu_config *config,
		     const struct kh_region *regions, uint32_t n_regions, uint64_t root_pa)
{
	size_t n_bytes = n_regions * sizeof(*regions);
	struct kh_mmu *mmu;
	int result;

	if (!n_regions || !regions_ok(regions, n_regions))
		return -EINVAL;
	mmu = mmu_alloc(config, &result);
	if (!mmu)
		return result;
	mmu->memory.regions = malloc(n_bytes);
	result = mmu->memory.regions ? 0 : -ENOMEM;
	if (!result) {
		memcpy(mmu->memory.regions, regions, n_bytes);
		mmu->memory.n_regions = n_regions;
		result = add_live_root(mmu, root_pa);
	}
	if (result < 0) {
		kh_mmu_close(mmu);
		return result;
	}
	*out = mmu;
	return 0;
}

void kh_mmu_close(struct kh_mmu *mmu)
{
	struct kh_root *next;

	for (struct kh_root *root = mmu->roots; root; root = next) {
		next = root->next;
		free(root);
	}
	/* Retired objects are returned to the arena, which must still exist. */
	kh_epoch_destroy(&mmu->epoch);
	pthread_rwlock_destroy(&mmu->lock.lock);
	pthread_mutex_destroy(&mmu->roots_lock);
	if (mmu->arena)
		kh_arena_close(mmu->arena);
	free(mmu->slots);
	free(mmu->memory.regions);
	free(mmu);
}

void kh_refuse(const struct kh_mmu *mmu, struct kh_descent *descent, uint64_t raw,
	       unsigned int level, uint64_t gfn, uint32_t reason)
{
	if (!descent->n_bad++)
		descent->first = (struct kh_bad_entry){
			.gfn = gfn,
			.entry = kh_raw(&mmu->fmt, raw),
			.level = level,
			.reason = reason,
		};
}

/* A table may not contain itself. A guest's own may, since guests map their tables that way. */
static bool in_path(const struct kh_mmu *mmu, const struct kh_descent *descent,
		    const uint64_t *child, unsigned int level)
{
	for (unsigned int above = level; above <= mmu->fmt.n_levels; above++) {
		uint64_t words = 1ull << mmu->fmt.bits[above];

		if (child >= descent->path[above] && child < descent->path[above] + words)
			return true;
	}
	return false;
}

/* A radix entry names the index width of the next table. */
static bool wrong_width(const struct kh_format *fmt, uint64_t raw, unsigned int level)
{
	return fmt->id == KH_FMT_RADIX && (kh_raw(fmt, raw) & 0x1f) != fmt->bits[level - 1];
}

uint64_t *kh_descend(const struct kh_mmu *mmu, struct kh_descent *descent, uint64_t raw,
		     unsigned int level, uint64_t gfn)
{
	uint64_t *child = kh_child(mmu, raw, level);
	uint32_t reason = child ? 0 : KH_BAD_OUTSIDE;

	if (mmu->flags & KH_MMU_KVM) {
		if (wrong_width(&mmu->fmt, raw, level))
			reason = KH_BAD_WIDTH;
		else if (child && in_path(mmu, descent, child, level))
			reason = KH_BAD_LOOP;
	}
	if (reason) {
		kh_refuse(mmu, descent, raw, level, gfn, reason);
		return NULL;
	}
	descent->path[level - 1] = child;
	return child;
}

int kh_mmu_read_entry(struct kh_mmu *mmu, uint32_t as_id, uint64_t gfn, uint32_t level,
		      uint64_t *raw)
{
	unsigned int slot;
	struct kh_root *root;
	int result = -ENOENT;

	if (gfn >= kh_n_gfns(&mmu->fmt) || level < 1 || level > mmu->fmt.n_levels)
		return -EINVAL;
	slot = kh_epoch_enter(&mmu->epoch);
	kh_for_each_root_lockless(mmu, root, as_id) {
		uint64_t *table = root->table;
		unsigned int at = mmu->fmt.n_levels;

		if (__atomic_load_n(&root->invalid, __ATOMIC_ACQUIRE))
			continue;
		for (; table; at--) {
			*raw = kh_read_entry(table + kh_index(&mmu->fmt, gfn, at));
			if (at == level) {
				result = 0;
				break;
			}
			table = kh_table(&mmu->fmt, *raw, at) ?
				kh_child(mmu, *raw, at) : NULL;
		}
		break;
	}
	kh_epoch_exit(&mmu->epoch, slot);
	return result;
}
