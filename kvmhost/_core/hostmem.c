#include "hostmem.h"

#include <fcntl.h>

#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* Since Linux 6.1 and 5.14, newer than some C libraries. */
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define HUGE_BYTES (2ul << 20)
#define PAGE_SHIFT 12
#define CHUNK_PAGES 8192

int kh_map(int fd, uint64_t n_bytes, uint64_t *address)
{
	void *mapping = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);

	if (mapping == MAP_FAILED)
		return -errno;
	*address = (uintptr_t)mapping;
	return 0;
}

int kh_map_huge(int fd, uint64_t n_bytes, uint64_t *address)
{
	uint64_t room = n_bytes + HUGE_BYTES, start, end;
	void *space = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int result;

	if (space == MAP_FAILED)
		return -errno;
	start = ((uintptr_t)space + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES;
	end = start + n_bytes;
	result = kh_remap(fd, 0, n_bytes, start);
	if (!result && madvise((void *)(uintptr_t)start, n_bytes, MADV_HUGEPAGE))
		result = -errno;
	if (result) {
		munmap(space, room);
		return result;
	}
	if (start > (uintptr_t)space)
		munmap(space, start - (uintptr_t)space);
	if (end < (uintptr_t)space + room)
		munmap((void *)(uintptr_t)end, (uintptr_t)space + room - end);
	*address = start;
	return 0;
}

static int advise(uint64_t address, uint64_t n_bytes, int advice)
{
	while (madvise((void *)(uintptr_t)address, n_bytes, advice))
		if (errno != EINTR && errno != EAGAIN)
			return -errno;
	return 0;
}

int kh_collapse(uint64_t address, uint64_t n_bytes)
{
	return advise(address, n_bytes, MADV_COLLAPSE);
}

int kh_populate(uint64_t address, uint64_t n_bytes)
{
	return advise(address, n_bytes, MADV_POPULATE_WRITE);
}

int kh_unmap(uint64_t address, uint64_t n_bytes)
{
	return munmap((void *)(uintptr_t)address, n_bytes) ? -errno : 0;
}

int kh_protect(uint64_t address, uint64_t n_bytes, int access)
{
	static const int modes[] = {
		[KH_ACCESS_NONE] = PROT_NONE,
		[KH_ACCESS_READ] = PROT_READ,
		[KH_ACCESS_WRITE] = PROT_READ | PROT_WRITE,
	};

	if (access < KH_ACCESS_NONE || access > KH_ACCESS_WRITE)
		return -EINVAL;
	return mprotect((void *)(uintptr_t)address, n_bytes, modes[access]) ? -errno : 0;
}

static int map_at(uint64_t address, uint64_t n_bytes, int prot, int flags, int fd, uint64_t offset)
{
	void *at = (void *)(uintptr_t)address;

	return mmap(at, n_bytes, prot, flags | MAP_FIXED, fd, offset) == MAP_FAILED ? -errno : 0;
}

int kh_vacate(uint64_t address, uint64_t n_bytes)
{
	return map_at(address, n_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
		      -1, 0);
}

int kh_remap(int fd, uint64_t offset, uint64_t n_bytes, uint64_t address)
{
	return map_at(address, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
		      offset);
}

int kh_guest_copy(uint64_t address, uint8_t *buffer, uint64_t n_bytes, int write)
{
	uint64_t done = 0;

	while (done < n_bytes) {
		struct iovec here = { buffer + done, n_bytes - done };
		struct iovec guest = { (void *)(uintptr_t)(address + done), n_bytes - done };
		ssize_t n = write ? process_vm_writev(getpid(), &here, 1, &guest, 1, 0)
				  : process_vm_readv(getpid(), &here, 1, &guest, 1, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EFAULT;
		done += n;
	}
	return 0;
}

static int test_bit(const uint64_t *words, uint64_t bit)
{
	return words[bit / 64] >> (bit % 64) & 1;
}

/* First set bit at or after from, or n_pages. */
static uint64_t next_set(const uint64_t *words, uint64_t from, uint64_t n_pages)
{
	while (from < n_pages) {
		uint64_t word = words[from / 64] >> (from % 64);

		if (word) {
			from += __builtin_ctzll(word);
			return from < n_pages ? from : n_pages;
		}
		from = (from / 64 + 1) * 64;
	}
	return n_pages;
}

static int zap_run(uint64_t address, uint64_t start, uint64_t end)
{
	return madvise((void *)(uintptr_t)(address + (start << PAGE_SHIFT)),
		       (end - start) << PAGE_SHIFT, MADV_DONTNEED) ? -errno : 0;
}

int64_t kh_zap(uint64_t address, uint64_t n_pages, const uint64_t *words, uint64_t gap_pages)
{
	uint64_t start, end, next;
	int64_t calls = 0;

	if (!words) {
		int result = zap_run(address, 0, n_pages);

		return result ? result : 1;
	}
	for (start = next_set(words, 0, n_pages); start < n_pages; start = next) {
		int result;

		for (end = start + 1;; end = next + 1) {
			while (end < n_pages && test_bit(words, end))
				end++;
			next = next_set(words, end, n_pages);
			if (next >= n_pages || next - end > gap_pages)
				break;
		}
		result = zap_run(address, start, end);
		if (result)
			return result;
		calls++;
	}
	return calls;
}

int kh_resident(uint64_t address, uint64_t n_pages, uint64_t *words)
{
	unsigned char *held = malloc(CHUNK_PAGES);
	uint64_t page = 0;

	if (!held)
		return -ENOMEM;
	while (page < n_pages) {
		uint64_t n = n_pages - page < CHUNK_PAGES ? n_pages - page : CHUNK_PAGES;
		void *start = (void *)(uintptr_t)(address + (page << PAGE_SHIFT));

		if (mincore(start, n << PAGE_SHIFT, held)) {
			int error = errno;

			if (error == EAGAIN)
				continue;
			free(held);
			return -error;
		}
		for (uint64_t i = 0; i < n; i++)
			if (held[i] & 1)
				words[(page + i) / 64] |= 1ull << (page + i) % 64;
		page += n;
	}
	free(held);
	return 0;
}

static void set_bits(uint64_t *words, uint64_t from, uint64_t to)
{
	for (; from < to; from++)
		words[from / 64] |= 1ull << (from % 64);
}

int kh_held(int fd, uint64_t offset, uint64_t n_pages, uint64_t *words)
{
	off_t end = offset + (n_pages << PAGE_SHIFT), data = offset, hole;

	while (data < end) {
		data = lseek(fd, data, SEEK_DATA);
		if (data < 0)
			return errno == ENXIO ? 0 : -errno;
		if (data >= end)
			return 0;
		hole = lseek(fd, data, SEEK_HOLE);
		if (hole < 0)
			return errno == ENXIO ? 0 : -errno;
		hole = hole < end ? hole : end;
		set_bits(words, (data - offset) >> PAGE_SHIFT, (hole - offset) >> PAGE_SHIFT);
		data = hole;
	}
	return 0;
}

int kh_punch(int fd, uint64_t offset, uint64_t n_bytes)
{
	return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, n_bytes) ? -errno
											 : 0;
}
