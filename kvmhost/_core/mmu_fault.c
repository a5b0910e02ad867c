/*
 * Accesses, faults, and the invalidations that race with them.
 *
 * A fault notes the invalidation sequence, finds the frame without any lock, then
 * takes the MMU lock and maps, unless an invalidation that covers the gfn is under
 * way or any has ended since then: the frame may be stale, and the fault starts over
 * (include/linux/kvm_host.h: mmu_invalidate_retry_gfn() on x86; arm64 and powerpc use
 * mmu_invalidate_retry(), which takes any invalidation in progress for one of the gfn).
 */
#include "mmu_internal.h"

#include <stdlib.h>
#include <string.h>

const struct kh_slot *kh_slot_find(const struct kh_mmu *mmu, uint32_t as_id, uint64_t gfn)
{
	const struct kh_slot_array *array = __atomic_load_n(&mmu->slots, __ATOMIC_ACQUIRE);
	uint32_t lo = 0, hi = array ? array->n : 0;

	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2;
		const struct kh_slot *slot = &array->slots[mid];

		if (slot->as_id < as_id ||
		    (slot->as_id == as_id && slot->gfn_start + slot->n_pages <= gfn))
			lo = mid + 1;
		else
			hi = mid;
	}
	if (!array || lo == array->n || array->slots[lo].as_id != as_id ||
	    array->slots[lo].gfn_start > gfn)
		return NULL;
	return &array->slots[lo];
}

/*
 * As kvm_swap_active_memslots() in virt/kvm/kvm_main.c: the new slots are
 * published, then a grace period passes. A fault looks its slot up and maps within
 * one epoch, so once this returns no fault maps by the old slots, and an unmapped
 * gfn stays unmapped.
 */
int kh_mmu_set_slots(struct kh_mmu *mmu, const struct kh_slot *slots, uint32_t n_slots)
{
	struct kh_slot_array *fresh = malloc(sizeof(*fresh) + n_slots * sizeof(*slots));
	struct kh_slot_array *old;

	if (!fresh)
		return -ENOMEM;
	fresh->n = n_slots;
	if (n_slots)
		memcpy(fresh->slots, slots, n_slots * sizeof(*slots));
	old = __atomic_exchange_n(&mmu->slots, fresh, __ATOMIC_SEQ_CST);
	if (old)
		kh_epoch_synchronize(&mmu->epoch);
	free(old);
	return 0;
}

/*
 * Set bits in an entry while it is a leaf; returns true if it is a leaf with these bits at
 * the end.
 */
static bool set_bits(const struct kh_format *fmt, uint64_t *entry, uint64_t raw,
		     unsigned int level, uint64_t bits, uint64_t *set)
{
	while (kh_leaf(fmt, raw, level)) {
		if ((raw & bits) == bits)
			return true;
		if (__atomic_compare_exchange_n(entry, &raw, raw | bits, false, __ATOMIC_SEQ_CST,
						__ATOMIC_ACQUIRE)) {
			*set += !kh_young(fmt, raw) && (bits & fmt->young.raw_clear);
			return true;
		}
		/*
		 * The entry changed concurrently: hardware would walk again; here the entry is read
		 * again.
		 */
		if (!(raw & fmt->raw_write) && bits & fmt->raw_dirty_set)
			return false;
	}
	return false;
}

int kh_hw_walk(struct kh_mmu *mmu, uint32_t as_id, uint64_t gfn, bool write,
	       struct kh_translation *out, uint64_t *set)
{
	const struct kh_format *fmt = &mmu->fmt;
	struct kh_root *root = kh_root_current(mmu, as_id);
	uint64_t *table = root ? root->table : NULL;
	uint64_t bits = fmt->young.raw_clear | (write ? fmt->raw_dirty_set : 0);

	if (gfn >= kh_n_gfns(fmt))
		return KH_FAULT_ABSENT;
	for (unsigned int level = fmt->n_levels; table; level--) {
		uint64_t *entry = table + kh_index(fmt, gfn, level);
		uint64_t raw = kh_read_entry(entry);

		if (!kh_leaf(fmt, raw, level)) {
			table = kh_table(fmt, raw, level) ? kh_child(mmu, raw, level) : NULL;
			continue;
		}
		if (write && !(raw & fmt->raw_write))
			return KH_FAULT_WRITE;
		if (fmt->sw_access && !kh_young(fmt, raw))
			return KH_FAULT_ACCESS;
		if (fmt->sw_access && write && !kh_dirty(fmt, raw))
			return KH_FAULT_WRITE;
		if (!set_bits(fmt, entry, raw, level, bits, set))
			return KH_FAULT_ABSENT;
		out->level = level;
		out->gfn = gfn & ~(kh_level_pages(fmt, level) - 1);
		out->pfn = kh_leaf_pfn(fmt, raw);
		out->write = write || ((raw & fmt->raw_write) && kh_dirty(fmt, raw));
		return 0;
	}
	return KH_FAULT_ABSENT;
}

int kh_mmu_access(struct kh_mmu *mmu, uint32_t as_id, uint64_t gfn, int write)
{
	struct kh_translation ignored;
	uint64_t set = 0;
	unsigned int slot = kh_epoch_enter(&mmu->epoch);
	int result = kh_hw_walk(mmu, as_id, gfn, write, &ignored, &set);

	kh_epoch_exit(&mmu->epoch, slot);
	if (set)
		kh_count(&mmu->counters.set_young, set);
	return result;
}

uint64_t kh_mmu_fault_begin(struct kh_mmu *mmu)
{
	return __atomic_load_n(&mmu->invalidate_seq, __ATOMIC_ACQUIRE);
}

int kh_mmu_invalidate_retry(struct kh_mmu *mmu, uint64_t gfn, uint64_t seq)
{
	if (__atomic_load_n(&mmu->invalidate_in_progress, __ATOMIC_ACQUIRE) &&
	    (!mmu->range_retry ||
	     (gfn >= mmu->invalidate_start && gfn < mmu->invalidate_end)))
		return 1;
	return __atomic_load_n(&mmu->invalidate_seq, __ATOMIC_ACQUIRE) != seq;
}

/* The largest leaf that fits: inside the slot, aligned alike in gfn and frame. */
static unsigned int pick_level(const struct kh_format *fmt, const struct kh_slot *slot,
			       uint64_t gfn)
{
	unsigned int level = slot->max_level ? slot->max_level : 1;
	unsigned int per_page = fmt->page_shift - 12;

	if (slot->flags & KH_SLOT_LOG_DIRTY)
		return 1;
	for (level = level < fmt->max_leaf_level ? level : fmt->max_leaf_level; level > 1;
	     level--) {
		uint64_t pages = kh_level_pages(fmt, level);
		uint64_t first = gfn & ~(pages - 1);
		uint64_t pfn = slot->pfn_start + ((first - slot->gfn_start) << per_page);

		if (first >= slot->gfn_start &&
		    first + pages <= slot->gfn_start + slot->n_pages && !(pfn % (pages << per_page)))
			break;
	}
	return level;
}

/* A leaf exists: add the permissions that the access needs (as fast_page_fault() does). */
static int fix_leaf(struct kh_mmu *mmu, struct kh_root *root, uint64_t gfn, bool write,
		    bool *found)
{
	const struct kh_format *fmt = &mmu->fmt;
	uint64_t bits = fmt->young.raw_clear;
	uint64_t set = 0;

	if (write)
		bits |= fmt->raw_write_all | fmt->raw_dirty_set;
	*found = false;
	for (unsigned int level = fmt->max_leaf_level; level >= 1; level--) {
		uint64_t *entry = kh_entry_find(mmu, root, gfn, level);
		uint64_t raw = entry ? kh_read_entry(entry) : 0;

		if (!kh_leaf(fmt, raw, level))
			continue;
		*found = true;
		while (kh_leaf(fmt, raw, level) && (raw & bits) != bits) {
			if (!__atomic_compare_exchange_n(entry, &raw, raw | bits, false,
							 __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE))
				continue;
			set = !kh_young(fmt, raw);
			break;
		}
		if (set)
			kh_count(&mmu->counters.set_young, set);
		return kh_leaf(fmt, raw, level) ? 0 : -EAGAIN;
	}
	return 0;
}

static int install(struct kh_mmu *mmu, struct kh_root *root, const struct kh_slot *slot,
		   uint64_t gfn, bool write)
{
	const struct kh_format *fmt = &mmu->fmt;
	struct kh_map map = {
		.as_id = slot->as_id,
		.flags = KH_LEAF_YOUNG | (write ? KH_LEAF_DIRTY : 0),
	};
	int result = -EEXIST;

	/* With dirty logging on, a page becomes writable at the first write. */
	if (!(slot->flags & KH_SLOT_READ_ONLY) && (write || !(slot->flags & KH_SLOT_LOG_DIRTY)))
		map.flags |= KH_LEAF_WRITE;
	for (map.level = pick_level(fmt, slot, gfn); map.level >= 1 && result == -EEXIST;
	     map.level--) {
		map.gfn = gfn & ~(kh_level_pages(fmt, map.level) - 1);
		map.pfn = slot->pfn_start + ((map.gfn - slot->gfn_start) << (fmt->page_shift - 12));
		switch (fmt->id) {
		case KH_FMT_STAGE2:
			result = kh_stage2_map(mmu, root, &map);
			break;
		case KH_FMT_RADIX:
			result = kh_radix_map(mmu, root, &map);
			break;
		default:
			result = kh_tdp_map(mmu, root, &map);
		}
	}
	if (!result)
		kh_count(&mmu->counters.born_young, 1);
	/* An entry exists at every level: another fault mapped the gfn. The next walk finds it. */
	return result == -EEXIST ? -EAGAIN : result;
}

/* With the MMU lock held as the format's faults hold it. */
static int fault_locked(struct kh_mmu *mmu, const struct kh_slot *slot, uint64_t gfn, bool write,
			uint64_t seq)
{
	struct kh_root *root;
	bool found;
	int result;

	if (mmu->released)
		return -ESHUTDOWN;
	if (kh_mmu_invalidate_retry(mmu, gfn, seq))
		return -EAGAIN;
	root = kh_root_current(mmu, slot->as_id);
	if (!root)
		return -ESHUTDOWN;
	result = fix_leaf(mmu, root, gfn, write, &found);
	return found ? result : install(mmu, root, slot, gfn, write);
}

int kh_mmu_fault_finish(struct kh_mmu *mmu, uint32_t as_id, uint64_t gfn, int write,
			uint64_t seq)
{
	unsigned int epoch = kh_epoch_enter(&mmu->epoch);
	const struct kh_slot *slot = kh_slot_find(mmu, as_id, gfn);
	int result = -EFAULT;

	if (slot && write && slot->flags & KH_SLOT_READ_ONLY) {
		result = -EROFS;
	} else if (slot) {
		if (mmu->fmt.id == KH_FMT_RADIX)
			kh_write_lock(&mmu->lock);
		else
			kh_read_lock(&mmu->lock);
		result = fault_locked(mmu, slot, gfn, write, seq);
		kh_unlock(&mmu->lock);
	}
	kh_epoch_exit(&mmu->epoch, epoch);
	kh_count(&mmu->counters.faults, 1);
	if (result == -EAGAIN)
		kh_count(&mmu->counters.fault_retries, 1);
	return result;
}

int kh_mmu_touch(struct kh_mmu *mmu, uint32_t as_id, uint64_t gfn, int write)
{
	while (kh_mmu_access(mmu, as_id, gfn, write)) {
		uint64_t seq = kh_mmu_fault_begin(mmu);
		int result = kh_mmu_fault_finish(mmu, as_id, gfn, write, seq);

		if (result < 0 && result != -EAGAIN)
			return result;
		if (result == -EAGAIN &&
		    __atomic_load_n(&mmu->invalidate_in_progress, __ATOMIC_RELAXED))
			return result; /* the caller decides how to wait */
	}
	return 0;
}

/* Called with the lock held for write (mmu_invalidate_begin, mmu_invalidate_range_add). */
static void note_range(struct kh_mmu *mmu, uint64_t start, uint64_t end)
{
	if (mmu->invalidate_in_progress == 1 && mmu->invalidate_start == mmu->invalidate_end) {
		mmu->invalidate_start = start;
		mmu->invalidate_end = end;
		return;
	}
	/*
	 * One range that covers all invalidations in progress: it may be too large, never too
	 * small.
	 */
	mmu->invalidate_start = start < mmu->invalidate_start ? start : mmu->invalidate_start;
	mmu->invalidate_end = end > mmu->invalidate_end ? end : mmu->invalidate_end;
}

int kh_mmu_invalidate_start(struct kh_mmu *mmu, const struct kh_segment *ranges, uint32_t n)
{
	bool any = false;

	kh_write_lock(&mmu->lock);
	if (mmu->invalidate_in_progress == 0)
		mmu->invalidate_start = mmu->invalidate_end = 0;
	__atomic_fetch_add(&mmu->invalidate_in_progress, 1, __ATOMIC_SEQ_CST);
	for (uint32_t i = 0; i < n; i++) {
		uint64_t end = ranges[i].gfn_start + ranges[i].n_pages;

		note_range(mmu, ranges[i].gfn_start, end);
	}
	kh_unlock(&mmu->lock);
	for (uint32_t i = 0; i < n; i++) {
		int result = kh_mmu_unmap(mmu, ranges[i].as_id, ranges[i].gfn_start,
					  ranges[i].gfn_start + ranges[i].n_pages, 0);

		if (result < 0)
			return result;
		any |= result > 0;
	}
	return any;
}

int kh_mmu_invalidate_end(struct kh_mmu *mmu, const struct kh_segment *ranges, uint32_t n)
{
	int result = 0;

	(void)ranges;
	(void)n;
	kh_write_lock(&mmu->lock);
	/* The sequence first: a fault that sees the count drop must see the new sequence. */
	__atomic_fetch_add(&mmu->invalidate_seq, 1, __ATOMIC_SEQ_CST);
	if (mmu->invalidate_in_progress)
		__atomic_fetch_sub(&mmu->invalidate_in_progress, 1, __ATOMIC_SEQ_CST);
	else
		result = -EINVAL;
	kh_unlock(&mmu->lock);
	return result;
}
