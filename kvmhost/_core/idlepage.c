#include "idlepage.h"

#include <string.h>
#include <unistd.h>

#define PRESENT (1ull << 63)
#define PFN_MASK ((1ull << 55) - 1)
#define RUN_WORDS 512

int kh_pagemap_pfns(int pagemap_fd, uint64_t address, uint64_t n_pages, uint64_t *pfns)
{
	for (uint64_t page = 0; page < n_pages;) {
		uint64_t n = n_pages - page;
		off_t offset = ((address >> 12) + page) * sizeof(*pfns);
		ssize_t got = pread(pagemap_fd, pfns + page, n * sizeof(*pfns), offset);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < (ssize_t)sizeof(*pfns))
			return got < 0 ? -errno : -EIO;
		n = got / sizeof(*pfns);
		for (uint64_t i = page; i < page + n; i++) {
			if (pfns[i] & PRESENT && !(pfns[i] & PFN_MASK))
				return -EPERM;
			pfns[i] = pfns[i] & PRESENT ? pfns[i] & PFN_MASK : 0;
		}
		page += n;
	}
	return 0;
}

static uint64_t run_length(const uint64_t *indexes, uint64_t n)
{
	uint64_t length = 1;

	while (length < n && length < RUN_WORDS && indexes[length] == indexes[0] + length)
		length++;
	return length;
}

int kh_words_read(int fd, const uint64_t *indexes, uint64_t n, uint64_t *words)
{
	for (uint64_t i = 0, length; i < n; i += length) {
		ssize_t got;

		length = run_length(indexes + i, n - i);
		do
			got = pread(fd, words + i, length * 8, indexes[i] * 8);
		while (got < 0 && errno == EINTR);
		/* Beyond the last pfn, page_idle returns ENXIO and kpageflags end of file. */
		if (got < 0 && errno != ENXIO)
			return -errno;
		got = got < 0 ? 0 : got;
		memset((char *)(words + i) + got, 0, length * 8 - got);
	}
	return 0;
}

int kh_words_write(int fd, const uint64_t *indexes, uint64_t n, const uint64_t *words)
{
	for (uint64_t i = 0, length; i < n; i += length) {
		uint64_t done = 0;

		length = run_length(indexes + i, n - i);
		while (done < length) {
			ssize_t put = pwrite(fd, words + i + done, (length - done) * 8,
					     (indexes[i] + done) * 8);

			if (put < 0 && errno == EINTR)
				continue;
			if (put < 0 && errno == ENXIO)
				break;
			if (put < 8)
				return put < 0 ? -errno : -EIO;
			done += put / 8;
		}
	}
	return 0;
}
