/*
 * A ring of what happened to pages: evictions by cause, refaults, restores, drops. Readers
 * name the number of the first event that they want, so that any number of them can read.
 * Its memory is touched as events are written: a VM that evicts nothing pays nothing.
 */
#include "pager_internal.h"

#include <stdlib.h>

#define LEAST_EVENTS (1ull << 16)
#define MOST_EVENTS (1ull << 20)
#define INDEX_BITS 32

int kh_log_init(struct kh_page_log *log, uint64_t n_pages)
{
	uint64_t capacity = LEAST_EVENTS;

	while (capacity < 4 * n_pages && capacity < MOST_EVENTS)
		capacity *= 2;
	log->mask = capacity - 1;
	log->events = calloc(capacity, sizeof(*log->events));
	pthread_mutex_init(&log->lock, NULL);
	return log->events ? 0 : -ENOMEM;
}

void kh_log_destroy(struct kh_page_log *log)
{
	free(log->events);
	pthread_mutex_destroy(&log->lock);
}

void kh_pager_log(struct kh_pager *pager, uint64_t index, uint64_t event)
{
	struct kh_page_log *log = &pager->log;

	pthread_mutex_lock(&log->lock);
	log->events[log->next & log->mask] = event << INDEX_BITS | index;
	log->next++;
	pthread_mutex_unlock(&log->lock);
}

uint64_t kh_pager_read_log(struct kh_pager *pager, uint64_t since, uint64_t *out, uint64_t n,
			   struct kh_log_position *position)
{
	struct kh_page_log *log = &pager->log;
	uint64_t oldest, found = 0;

	pthread_mutex_lock(&log->lock);
	oldest = log->next > log->mask ? log->next - log->mask - 1 : 0;
	/* A number from another VM, or from the future: nothing is known to be missing. */
	if (since > log->next)
		since = log->next;
	position->lost = since < oldest ? oldest - since : 0;
	since += position->lost;
	while (since < log->next && found < n)
		out[found++] = log->events[since++ & log->mask];
	position->next = since;
	position->end = log->next;
	pthread_mutex_unlock(&log->lock);
	return found;
}
