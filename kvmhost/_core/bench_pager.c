#include "bench_pager.h"

#include "hostmem.h"
#include "store_internal.h"
#include "uffd.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define RUN_PAGES 16

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

void kh_bench_touch(uint64_t address, const uint32_t *pages, uint64_t n, uint64_t *times)
{
	for (uint64_t i = 0; i < n; i++) {
		uint64_t start = now_ns();

		(void)*(volatile char *)(address + pages[i] * (uint64_t)KH_PAGE_BYTES);
		times[i] = now_ns() - start;
	}
}

struct kh_bench_pager {
	int uffd, memfd, stop_event;
	uint64_t address, n_pages;
	char *copies;
	pthread_t thread;
};

static void *serve(void *argument)
{
	struct kh_bench_pager *pager = argument;
	struct pollfd wait[2] = {
		{ .fd = pager->uffd, .events = POLLIN },
		{ .fd = pager->stop_event, .events = POLLIN },
	};

	for (;;) {
		struct uffd_msg message;
		struct uffdio_copy copy = { .len = KH_PAGE_BYTES };

		if (poll(wait, 2, -1) < 0 || wait[1].revents)
			return NULL;
		if (read(pager->uffd, &message, sizeof(message)) != sizeof(message))
			continue;
		copy.dst = message.arg.pagefault.address & ~(KH_PAGE_BYTES - 1ull);
		copy.src = (uintptr_t)pager->copies + copy.dst - pager->address;
		ioctl(pager->uffd, UFFDIO_COPY, &copy);
	}
}

struct kh_bench_pager *kh_bench_pager_new(int uffd, int memfd, uint64_t address, uint64_t n_pages)
{
	struct kh_bench_pager *pager = calloc(1, sizeof(*pager));

	if (!pager)
		return NULL;
	*pager = (struct kh_bench_pager){ uffd, memfd, eventfd(0, EFD_CLOEXEC), address, n_pages,
					  malloc(n_pages * KH_PAGE_BYTES), 0 };
	if (pager->copies && pager->stop_event >= 0 &&
	    !kh_uffd_register(uffd, address, n_pages * KH_PAGE_BYTES, KH_UFFD_MISSING) &&
	    !pthread_create(&pager->thread, NULL, serve, pager))
		return pager;
	if (pager->stop_event >= 0)
		close(pager->stop_event);
	free(pager->copies);
	free(pager);
	return NULL;
}

int kh_bench_pager_evict(struct kh_bench_pager *pager)
{
	for (uint64_t i = 0; i < pager->n_pages; i += RUN_PAGES) {
		uint64_t run = pager->n_pages - i < RUN_PAGES ? pager->n_pages - i : RUN_PAGES;
		uint64_t offset = i * KH_PAGE_BYTES;
		int result;

		for (uint64_t j = 0; j < run * KH_PAGE_BYTES; j += KH_PAGE_BYTES)
			if (pread(pager->memfd, pager->copies + offset + j, KH_PAGE_BYTES,
				  offset + j) != KH_PAGE_BYTES)
				return -errno;
		result = kh_punch(pager->memfd, offset, run * KH_PAGE_BYTES);
		if (result)
			return result;
	}
	return 0;
}

void kh_bench_pager_free(struct kh_bench_pager *pager)
{
	uint64_t one = 1;

	if (write(pager->stop_event, &one, sizeof(one)) == sizeof(one))
		pthread_join(pager->thread, NULL);
	kh_uffd_unregister(pager->uffd, pager->address, pager->n_pages * KH_PAGE_BYTES);
	close(pager->stop_event);
	free(pager->copies);
	free(pager);
}

static int get_all(struct kh_store *store, const char *pages, uint64_t n, uint64_t *get_ns)
{
	for (uint64_t i = 0; i < n; i++) {
		char page[KH_PAGE_BYTES] __attribute__((aligned(64)));
		uint64_t start = now_ns();
		int result = kh_store_get(store, i, page);

		*get_ns += now_ns() - start;
		if (result)
			return result;
		if (memcmp(page, pages + i * KH_PAGE_BYTES, KH_PAGE_BYTES))
			return -EBADMSG;
	}
	return 0;
}

int kh_bench_store(const struct kh_codec *codec, const char *pages, uint64_t n,
		   struct kh_bench_store *result)
{
	struct kh_store store = { 0 };
	int error = kh_store_init(&store, n, codec, -1);

	*result = (struct kh_bench_store){ 0 };
	for (uint64_t i = 0; !error && i < n; i++) {
		uint64_t start = now_ns();

		if (kh_store_put(&store, i, pages + i * KH_PAGE_BYTES, 0) != KH_EVICT_DONE)
			error = -ENOMEM;
		result->put_ns += now_ns() - start;
	}
	result->stored_bytes = store.used_bytes;
	result->same_filled_pages = store.same_filled_pages;
	result->raw_pages = store.raw_pages;
	if (!error)
		error = get_all(&store, pages, n, &result->get_ns);
	kh_store_destroy(&store);
	return error;
}
