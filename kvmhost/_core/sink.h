/*
 * Output that never blocks the caller: a bounded ring, and a thread that writes it
 * to a descriptor of any kind. Bytes that do not fit are dropped and counted. Locks
 * itself.
 */
#ifndef KVMHOST_SINK_H
#define KVMHOST_SINK_H

#include "compat.h"

#define KH_SINK_BYTES 1048576

struct kh_sink;

struct kh_sink_counts {
	uint64_t dropped;	/* bytes that found no room, or that the descriptor refused */
	uint64_t waiting;	/* bytes that are not written yet */
	uint64_t blocked_ns;	/* start of the current stall, in ns; 0: none */
	int error;		/* errno of the last failed write; 0: none */
};

/* A sink of its own on a duplicate of fd; NULL without memory or descriptors. */
struct kh_sink *kh_sink_new(int fd);
/* Wait for room, at most KH_SINK_ROOM_NS, and not after such a wait timed out. */
void kh_sink_wait_room(struct kh_sink *sink);
/* Add bytes; never waits. They are written by the next publish, or as the ring fills. */
void kh_sink_put(struct kh_sink *sink, const char *data, uint64_t n_bytes);
/* Publish all bytes that were put. */
void kh_sink_publish(struct kh_sink *sink);
/* Wait until all published bytes are written, up to a timeout. Returns the bytes still pending. */
uint64_t kh_sink_drain(struct kh_sink *sink, uint64_t timeout_ns);
struct kh_sink_counts kh_sink_counts(struct kh_sink *sink);
/* Stop writing, end the thread and close the duplicate; pending bytes count as dropped. */
void kh_sink_stop(struct kh_sink *sink);
/* Stop, and free it. */
void kh_sink_free(struct kh_sink *sink);

#endif
