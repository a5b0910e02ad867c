#include "minor.h"

#include "hostmem.h"
#include "uffd.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096ull
#define MESSAGES 32
/* Pages that a harvest takes at once: a multiple of 64. */
#define CHUNK_PAGES 1024

struct region {
	uint64_t address;
	uint64_t first;
	uint64_t n_pages;
};

/*
 * The lock makes two pairs of steps atomic: setting a page's bit and mapping it
 * (the thread), clearing the bit and zapping the page (a harvest). Interleaved,
 * they could leave a page mapped whose bit is clear, and its touches would never be
 * recorded.
 */
struct kh_minor {
	int uffd;
	int stop_event;
	int running;
	pthread_t thread;
	pthread_mutex_t lock;
	uint32_t n_regions;
	struct region regions[KH_MINOR_REGIONS];
	uint64_t n_pages;
	uint64_t *young;
	struct kh_access *log;	/* a circle */
	uint64_t capacity;
	uint64_t start;
	uint64_t used;
	struct kh_minor_counts counts;
};

struct kh_minor *kh_minor_new(int uffd, uint64_t capacity)
{
	struct kh_minor *minor = calloc(1, sizeof(*minor));

	if (!minor)
		return NULL;
	minor->uffd = uffd;
	minor->capacity = capacity;
	minor->log = calloc(capacity ? capacity : 1, sizeof(*minor->log));
	if (!minor->log) {
		free(minor);
		return NULL;
	}
	pthread_mutex_init(&minor->lock, NULL);
	return minor;
}

int kh_minor_add_region(struct kh_minor *minor, uint64_t address, uint64_t n_pages)
{
	uint64_t total = minor->n_pages + n_pages;
	uint64_t *young;

	if (minor->running)
		return -EBUSY;
	if (minor->n_regions == KH_MINOR_REGIONS)
		return -ENOSPC;
	young = calloc((total + 63) / 64, sizeof(*young));
	if (!young)
		return -ENOMEM;
	free(minor->young);
	minor->young = young;
	minor->regions[minor->n_regions++] = (struct region){ address, minor->n_pages, n_pages };
	minor->n_pages = total;
	return 0;
}

static int64_t page_at(const struct kh_minor *minor, uint64_t address)
{
	for (uint32_t i = 0; i < minor->n_regions; i++) {
		const struct region *region = &minor->regions[i];

		if (address - region->address < region->n_pages * PAGE_BYTES)
			return region->first + (address - region->address) / PAGE_BYTES;
	}
	return -1;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void note(struct kh_minor *minor, uint64_t page, int is_write)
{
	uint64_t bit = 1ull << page % 64;

	/* Two vCPUs may fault on one page, or the host may have dropped its mapping. */
	if (minor->young[page / 64] & bit)
		return;
	minor->young[page / 64] |= bit;
	minor->counts.first++;
	if (minor->used == minor->capacity) {
		minor->counts.dropped++;
		return;
	}
	minor->log[(minor->start + minor->used++) % minor->capacity] =
		(struct kh_access){ now_ns(), page, is_write };
}

/* Map a page and wake its waiters; a hole is filled with zeros. */
static int resolve(struct kh_minor *minor, uint64_t address, int is_minor)
{
	int result = is_minor ? 0 : kh_uffd_zero(minor->uffd, address);

	if (!is_minor && !result) {
		minor->counts.filled++;
		return kh_uffd_wake(minor->uffd, address);
	}
	/* The memfd holds the page now, filled through the other mapping: map it. */
	if (result && result != -EEXIST)
		return result;
	result = kh_uffd_continue(minor->uffd, address);
	return result == -EEXIST ? kh_uffd_wake(minor->uffd, address) : result;
}

static void serve(struct kh_minor *minor, const struct uffd_msg *message)
{
	uint64_t address = message->arg.pagefault.address & ~(PAGE_BYTES - 1);
	uint64_t flags = message->arg.pagefault.flags;
	int64_t page = page_at(minor, address);
	int result;

	if (message->event != UFFD_EVENT_PAGEFAULT || page < 0)
		return;
	minor->counts.messages++;
	note(minor, page, (flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0);
	result = resolve(minor, address, (flags & UFFD_PAGEFAULT_FLAG_MINOR) != 0);
	/* ENOENT, ESRCH: the range is being unregistered; no thread waits for it. */
	if (!result || result == -ENOENT || result == -ESRCH)
		return;
	/*
	 * Punched meanwhile (EFAULT), or out of memory: wake the thread, which repeats the touch.
	 */
	minor->counts.errors += result != -EFAULT;
	kh_uffd_wake(minor->uffd, address);
}

static void *serve_all(void *argument)
{
	struct kh_minor *minor = argument;
	struct pollfd wait[2] = {
		{ .fd = minor->uffd, .events = POLLIN },
		{ .fd = minor->stop_event, .events = POLLIN },
	};
	struct uffd_msg messages[MESSAGES];

	for (;;) {
		ssize_t got;

		if (poll(wait, 2, -1) < 0 && errno != EINTR)
			return NULL;
		if (wait[1].revents || wait[0].revents & (POLLERR | POLLNVAL))
			return NULL;
		if (!wait[0].revents)
			continue;
		got = read(minor->uffd, messages, sizeof(messages));
		if (got <= 0)
			continue;
		pthread_mutex_lock(&minor->lock);
		for (uint64_t i = 0; i < got / sizeof(*messages); i++)
			serve(minor, &messages[i]);
		pthread_mutex_unlock(&minor->lock);
	}
}

static int start_thread(struct kh_minor *minor)
{
	sigset_t all, old;
	int result;

	minor->stop_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (minor->stop_event < 0)
		return -errno;
	/* The thread inherits the mask: other threads handle the signals. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	result = pthread_create(&minor->thread, NULL, serve_all, minor);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	minor->running = !result;
	if (result)
		close(minor->stop_event);
	return -result;
}

int kh_minor_start(struct kh_minor *minor)
{
	int result;

	if (minor->running)
		return -EBUSY;
	memset(minor->young, 0, (minor->n_pages + 63) / 64 * sizeof(*minor->young));
	minor->used = 0;
	result = start_thread(minor);
	/* Check the whole range before the first zap: an error leaves the host's PTEs unchanged. */
	for (uint32_t i = 0; !result && i < minor->n_regions; i++)
		result = kh_uffd_register(minor->uffd, minor->regions[i].address,
					  minor->regions[i].n_pages * PAGE_BYTES,
					  KH_UFFD_MISSING | KH_UFFD_MINOR);
	for (uint32_t i = 0; !result && i < minor->n_regions; i++) {
		int64_t calls = kh_zap(minor->regions[i].address, minor->regions[i].n_pages,
				       NULL, 0);

		result = calls < 0 ? (int)calls : 0;
	}
	if (result)
		kh_minor_stop(minor);
	return result;
}

void kh_minor_stop(struct kh_minor *minor)
{
	uint64_t one = 1;

	if (!minor->running)
		return;
	for (uint32_t i = 0; i < minor->n_regions; i++)
		kh_uffd_unregister(minor->uffd, minor->regions[i].address,
				   minor->regions[i].n_pages * PAGE_BYTES);
	while (write(minor->stop_event, &one, sizeof(one)) < 0 && errno == EINTR)
		;
	pthread_join(minor->thread, NULL);
	close(minor->stop_event);
	minor->running = 0;
}

static uint64_t young_of(const struct kh_minor *minor, uint64_t page)
{
	return minor->young[page / 64] >> page % 64 & 1;
}

/* Up to CHUNK_PAGES pages, word-aligned in the caller's bitmaps. */
static int harvest_chunk(struct kh_minor *minor, uint64_t first, uint64_t n_pages,
			 uint64_t address, int clear, const uint64_t *mask, uint64_t *words)
{
	uint64_t cleared[CHUNK_PAGES / 64] = { 0 };
	int64_t calls;

	for (uint64_t i = 0; i < n_pages; i++) {
		uint64_t bit = 1ull << i % 64, page = first + i;

		if (!young_of(minor, page))
			continue;
		words[i / 64] |= bit;
		if (!clear || (mask && !(mask[i / 64] & bit)))
			continue;
		cleared[i / 64] |= bit;
		minor->young[page / 64] &= ~(1ull << page % 64);
	}
	calls = clear ? kh_zap(address, n_pages, cleared, 0) : 0;
	return calls < 0 ? (int)calls : 0;
}

int kh_minor_harvest(struct kh_minor *minor, uint64_t first, uint64_t n_pages, int clear,
		     const uint64_t *mask, uint64_t *words)
{
	const struct region *region = NULL;
	int result = 0;

	for (uint32_t i = 0; i < minor->n_regions; i++)
		if (first - minor->regions[i].first < minor->regions[i].n_pages)
			region = &minor->regions[i];
	if (!region || n_pages > region->first + region->n_pages - first)
		return -ERANGE;
	for (uint64_t done = 0; !result && done < n_pages; done += CHUNK_PAGES) {
		uint64_t n = n_pages - done < CHUNK_PAGES ? n_pages - done : CHUNK_PAGES;
		uint64_t page = first + done;
		uint64_t address = region->address + (page - region->first) * PAGE_BYTES;

		pthread_mutex_lock(&minor->lock);
		result = harvest_chunk(minor, page, n, address, clear,
				       mask ? mask + done / 64 : NULL, words + done / 64);
		pthread_mutex_unlock(&minor->lock);
	}
	return result;
}

uint64_t kh_minor_take(struct kh_minor *minor, struct kh_access *accesses, uint64_t n)
{
	pthread_mutex_lock(&minor->lock);
	n = n < minor->used ? n : minor->used;
	for (uint64_t i = 0; i < n; i++)
		accesses[i] = minor->log[(minor->start + i) % minor->capacity];
	minor->used -= n;
	if (n)
		minor->start = (minor->start + n) % minor->capacity;
	pthread_mutex_unlock(&minor->lock);
	return n;
}

void kh_minor_counts(struct kh_minor *minor, struct kh_minor_counts *counts)
{
	pthread_mutex_lock(&minor->lock);
	*counts = minor->counts;
	pthread_mutex_unlock(&minor->lock);
}

void kh_minor_free(struct kh_minor *minor)
{
	if (!minor)
		return;
	kh_minor_stop(minor);
	pthread_mutex_destroy(&minor->lock);
	free(minor->young);
	free(minor->log);
	free(minor);
}
