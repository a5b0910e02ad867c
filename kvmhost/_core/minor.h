/*
 * First accesses by userfaultfd: every first touch of a page in a window is a
 * message, answered by a thread of this module. It maps the page and keeps a bit,
 * and the order and time of the touch in a log of bounded size. The thread never
 * enters Python, so that a thread that waits for a page may hold the interpreter
 * lock.
 */
#ifndef KVMHOST_MINOR_H
#define KVMHOST_MINOR_H

#include "compat.h"

#define KH_MINOR_REGIONS 8

struct kh_minor;

struct kh_access {
	uint64_t ns;		/* CLOCK_MONOTONIC, when the message was served */
	uint32_t page;		/* counted over all regions in their order */
	uint32_t is_write;
};

struct kh_minor_counts {
	uint64_t messages;	/* faults that reached the thread */
	uint64_t first;		/* of these: first touches in their window */
	uint64_t filled;	/* pages that were never touched before: zeros */
	uint64_t dropped;	/* first touches that were not logged because the log was full */
	uint64_t errors;	/* messages not served; the thread retries */
};

/* capacity: entries of the log. The descriptor must offer minor faults on shmem. */
struct kh_minor *kh_minor_new(int uffd, uint64_t capacity);
int kh_minor_add_region(struct kh_minor *minor, uint64_t address, uint64_t n_pages);
/* Start the thread, register every region and zap it: from here on all touches are recorded. */
int kh_minor_start(struct kh_minor *minor);
/* Unregister, which wakes all waiters, and end the thread. Idempotent. */
void kh_minor_stop(struct kh_minor *minor);
/*
 * Set bit i of words for each page first + i (of one region) that was touched. With
 * clear, those of mask (NULL: all) are zapped and begin a new window. words must be
 * zero at entry. Processed in chunks, so that a touch waits for at most one of
 * them.
 */
int kh_minor_harvest(struct kh_minor *minor, uint64_t first, uint64_t n_pages, int clear,
		     const uint64_t *mask, uint64_t *words);
/* Move the oldest entries of the log out, up to n; returns how many. */
uint64_t kh_minor_take(struct kh_minor *minor, struct kh_access *accesses, uint64_t n);
void kh_minor_counts(struct kh_minor *minor, struct kh_minor_counts *counts);
void kh_minor_free(struct kh_minor *minor);

#endif
