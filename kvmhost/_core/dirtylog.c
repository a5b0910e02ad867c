#include "dirtylog.h"

#include <string.h>

static uint64_t words_of(uint64_t n_pages)
{
	return (n_pages + 63) / 64;
}

/* 64 bits from any bit position on; those at and after n_bits are 0. */
static uint64_t bits_at(const uint64_t *words, uint64_t bit, uint64_t n_bits)
{
	uint64_t value;

	if (bit >= n_bits)
		return 0;
	value = words[bit / 64] >> (bit % 64);
	if (bit % 64 && (bit / 64 + 1) * 64 < n_bits)
		value |= words[bit / 64 + 1] << (64 - bit % 64);
	return n_bits - bit < 64 ? value & ((1ull << (n_bits - bit)) - 1) : value;
}

static int fetch(int vm_fd, uint32_t slot, uint64_t *log)
{
	struct kvm_dirty_log request = { .slot = slot, .dirty_bitmap = log };

	return ioctl(vm_fd, KVM_GET_DIRTY_LOG, &request) ? -errno : 0;
}

/*
 * Clear what is set in the words [low, high) of a slot's bitmap; chosen[0] is word
 * low. Words without a bit at both ends are left out. KVM accepts whole words only,
 * except for the last one of the slot.
 */
static int clear_words(int vm_fd, uint32_t slot, uint64_t slot_pages, uint64_t low, uint64_t high,
		       uint64_t *chosen)
{
	uint64_t start = low, end = high;
	struct kvm_clear_dirty_log request = { .slot = slot };

	while (start < end && !chosen[start - low])
		start++;
	while (end > start && !chosen[end - low - 1])
		end--;
	if (start == end)
		return 0;
	request.first_page = start * 64;
	request.num_pages = (end * 64 < slot_pages ? end * 64 : slot_pages) - start * 64;
	request.dirty_bitmap = chosen + (start - low);
	return ioctl(vm_fd, KVM_CLEAR_DIRTY_LOG, &request) ? -errno : 0;
}

/* Shift words & mask, whose bit 0 is page first, to the slot's word positions in room. */
static int clear_part(int vm_fd, uint32_t slot, uint64_t slot_pages, uint64_t first,
		      uint64_t n_pages, const uint64_t *mask, const uint64_t *words, uint64_t *room)
{
	uint64_t low = first / 64, high = words_of(first + n_pages), shift = first % 64;
	uint64_t carry = 0;

	for (uint64_t i = 0; i < high - low; i++) {
		uint64_t value = i < words_of(n_pages) ? words[i] & (mask ? mask[i] : ~0ull) : 0;

		room[i] = carry | value << shift;
		carry = shift ? value >> (64 - shift) : 0;
	}
	return clear_words(vm_fd, slot, slot_pages, low, high, room);
}

int kh_dirty_harvest(int vm_fd, uint32_t slot, uint64_t slot_pages, uint64_t first,
		     uint64_t n_pages, int clear, const uint64_t *mask, uint64_t *words,
		     uint64_t *room)
{
	int whole = !first && n_pages == slot_pages;
	int result;

	if (first > slot_pages || n_pages > slot_pages - first)
		return -ERANGE;
	if (!room && (!whole || (clear && mask)))
		return -EINVAL;
	result = fetch(vm_fd, slot, whole ? words : room);
	if (!result && !whole)
		for (uint64_t i = 0; i < words_of(n_pages); i++)
			words[i] = bits_at(room, first + i * 64, first + n_pages);
	if (result || !clear)
		return result;
	if (whole && !mask)
		return clear_words(vm_fd, slot, slot_pages, 0, words_of(n_pages), words);
	return clear_part(vm_fd, slot, slot_pages, first, n_pages, mask, words, room);
}
