#include "foreign.h"

#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE_SHIFT 12
#define RUNS 512

/* The kernel stops between ranges and returns the number of bytes processed. */
static int pageout(int pidfd, struct iovec *runs, uint64_t n)
{
	for (uint64_t i = 0; i < n;) {
		ssize_t done = syscall(SYS_process_madvise, pidfd, runs + i, n - i, MADV_PAGEOUT, 0);

		if (done < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (done < 0)
			return -errno;
		if (!done)
			return -EIO;
		for (; i < n && (size_t)done >= runs[i].iov_len; i++)
			done -= (ssize_t)runs[i].iov_len;
		if (i < n) {
			runs[i].iov_base = (char *)runs[i].iov_base + done;
			runs[i].iov_len -= (size_t)done;
		}
	}
	return 0;
}

static int is_set(const uint64_t *words, uint64_t page)
{
	return !words || words[page / 64] >> page % 64 & 1;
}

int kh_foreign_pageout(int pidfd, uint64_t address, uint64_t n_pages, const uint64_t *words)
{
	struct iovec runs[RUNS];
	uint64_t n = 0;
	int result = 0;

	for (uint64_t page = 0; !result && page < n_pages;) {
		uint64_t start = page;

		if (words && !words[page / 64] && !(page % 64)) {
			page += 64;
			continue;
		}
		while (page < n_pages && is_set(words, page))
			page++;
		if (page == start) {
			page++;
			continue;
		}
		runs[n].iov_base = (void *)(uintptr_t)(address + (start << PAGE_SHIFT));
		runs[n++].iov_len = (page - start) << PAGE_SHIFT;
		if (n == RUNS) {
			result = pageout(pidfd, runs, n);
			n = 0;
		}
	}
	return result || !n ? result : pageout(pidfd, runs, n);
}
