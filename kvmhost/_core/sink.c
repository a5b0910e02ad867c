/*
 * The thread may block, in poll() or, where others write to the same pipe or
 * terminal, in write(); no other thread blocks. The kick signal interrupts both. A
 * thread that does not return even then (a dead network file system) keeps the
 * sink, and frees it when it returns.
 */
#include "sink.h"

#include "kick.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define CHUNK_BYTES 4096	/* PIPE_BUF: a pipe that polls writable takes it whole */
#define ROOM_BYTES 8192		/* more than one exit of a vCPU can put */
#define ROOM_NS 250000000ull
#define STOP_NS 1000000000ull
#define RETRY_NS 10000000

struct kh_sink {
	pthread_mutex_t lock;
	pthread_cond_t filled;	/* something to write, or the end */
	pthread_cond_t taken;	/* something was written, or the thread has ended */
	pthread_t thread;
	int fd, tid;
	bool started, stopping, ended, joined, orphan;
	bool is_file;		/* a regular file: it may be slow, but needs no reader */
	bool patient;		/* a full ring is worth a short wait */
	bool given_up;		/* the last such wait timed out */
	uint64_t head, used, ready;
	struct kh_sink_counts counts;
	char *ring;
};

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void wait_until(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t deadline_ns)
{
	struct timespec at = { .tv_sec = deadline_ns / 1000000000ull,
			       .tv_nsec = deadline_ns % 1000000000ull };

	pthread_cond_timedwait(cond, lock, &at);
}

static void init_cond(pthread_cond_t *cond)
{
	pthread_condattr_t attributes;

	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(cond, &attributes);
	pthread_condattr_destroy(&attributes);
}

static void destroy(struct kh_sink *sink)
{
	pthread_cond_destroy(&sink->filled);
	pthread_cond_destroy(&sink->taken);
	pthread_mutex_destroy(&sink->lock);
	free(sink->ring);
	free(sink);
}

struct kh_sink *kh_sink_new(int fd)
{
	struct kh_sink *sink = calloc(1, sizeof(*sink));
	unsigned int number;
	struct stat about;
	int error;

	if (!sink)
		return NULL;
	sink->ring = malloc(KH_SINK_BYTES);
	/* A duplicate: the owner may close fd while the thread is still in write(). */
	sink->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	if (!sink->ring || sink->fd < 0 || fstat(fd, &about) || kh_kick_setup()) {
		error = errno;
		if (sink->fd >= 0)
			close(sink->fd);
		free(sink->ring);
		free(sink);
		errno = error;
		return NULL;
	}
	sink->is_file = S_ISREG(about.st_mode);
	/* A pseudo-terminal may have no reader at its other end: do not wait for one. */
	sink->patient = ioctl(fd, TIOCGPTN, &number) != 0;
	pthread_mutex_init(&sink->lock, NULL);
	init_cond(&sink->filled);
	init_cond(&sink->taken);
	return sink;
}

static void set_blocked(struct kh_sink *sink, uint64_t since)
{
	__atomic_store_n(&sink->counts.blocked_ns, since, __ATOMIC_RELAXED);
}

/* Write once. Returns what write() does, with EINTR and EAGAIN for "look again". */
static ssize_t write_once(struct kh_sink *sink, const char *chunk, uint64_t n_bytes)
{
	struct pollfd wait = { .fd = sink->fd, .events = POLLOUT };
	struct timespec retry = { .tv_nsec = RETRY_NS };
	ssize_t n;

	if (!sink->is_file && !__atomic_load_n(&sink->counts.blocked_ns, __ATOMIC_RELAXED))
		set_blocked(sink, now_ns());
	if (poll(&wait, 1, -1) < 0)
		return -1;
	n = write(sink->fd, chunk, n_bytes);
	/* A pseudo-terminal after a hangup polls ready but accepts no data. */
	if (n < 0 && errno == EAGAIN)
		nanosleep(&retry, NULL), errno = EAGAIN;
	return n;
}

/* Called with the lock held: n bytes were written or dropped. */
static void consume(struct kh_sink *sink, uint64_t n)
{
	sink->head = (sink->head + n) % KH_SINK_BYTES;
	sink->used -= n;
	sink->ready -= n;
	if (KH_SINK_BYTES - sink->used >= ROOM_BYTES)
		sink->given_up = false;
	pthread_cond_broadcast(&sink->taken);
}

static void write_ready(struct kh_sink *sink)
{
	char chunk[CHUNK_BYTES];
	uint64_t n = sink->ready < CHUNK_BYTES ? sink->ready : CHUNK_BYTES;
	uint64_t to_end = KH_SINK_BYTES - sink->head;
	ssize_t written;
	int error;

	if (n > to_end)
		n = to_end;
	memcpy(chunk, sink->ring + sink->head, n);
	pthread_mutex_unlock(&sink->lock);
	written = write_once(sink, chunk, n);
	error = written < 0 ? errno : 0;
	if (error != EINTR && error != EAGAIN)
		set_blocked(sink, 0);
	pthread_mutex_lock(&sink->lock);
	if (!error) {
		consume(sink, written);
	} else if (error != EINTR && error != EAGAIN) {
		/*
		 * These bytes are lost. The next ones are tried: a full disk may have space again.
		 */
		sink->counts.error = error;
		sink->counts.dropped += n;
		consume(sink, n);
	}
}

static void *run(void *argument)
{
	struct kh_sink *sink = argument;
	bool orphan;

	kh_thread_mask_signals();
	pthread_mutex_lock(&sink->lock);
	sink->tid = (int)syscall(SYS_gettid);
	while (!sink->stopping) {
		if (sink->ready)
			write_ready(sink);
		else
			pthread_cond_wait(&sink->filled, &sink->lock);
	}
	sink->ended = true;
	orphan = sink->orphan;
	close(sink->fd);
	pthread_cond_broadcast(&sink->taken);
	pthread_mutex_unlock(&sink->lock);
	if (orphan)
		destroy(sink);
	return NULL;
}

/* With the lock held. Without a thread everything is dropped, and counted. */
static void start(struct kh_sink *sink)
{
	sigset_t all, before;

	if (sink->started || sink->stopping)
		return;
	/* The thread begins with everything blocked: a signal is for the main thread. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	sink->started = pthread_create(&sink->thread, NULL, run, sink) == 0;
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void kh_sink_wait_room(struct kh_sink *sink)
{
	uint64_t end = 0;

	pthread_mutex_lock(&sink->lock);
	while (KH_SINK_BYTES - sink->used < ROOM_BYTES && !sink->given_up && !sink->stopping) {
		uint64_t now = now_ns();

		sink->ready = sink->used;
		start(sink);
		pthread_cond_signal(&sink->filled);
		if (!end)
			end = now + ROOM_NS;
		if (now >= end || (!sink->patient &&
				   __atomic_load_n(&sink->counts.blocked_ns, __ATOMIC_RELAXED))) {
			sink->given_up = true;
			break;
		}
		wait_until(&sink->taken, &sink->lock,
			   sink->patient ? end : now + RETRY_NS);
	}
	pthread_mutex_unlock(&sink->lock);
}

void kh_sink_put(struct kh_sink *sink, const char *data, uint64_t n_bytes)
{
	uint64_t room, tail, first;

	pthread_mutex_lock(&sink->lock);
	room = sink->stopping ? 0 : KH_SINK_BYTES - sink->used;
	if (n_bytes > room) {
		sink->counts.dropped += n_bytes - room;
		n_bytes = room;
	}
	tail = (sink->head + sink->used) % KH_SINK_BYTES;
	first = n_bytes < KH_SINK_BYTES - tail ? n_bytes : KH_SINK_BYTES - tail;
	memcpy(sink->ring + tail, data, first);
	memcpy(sink->ring, data + first, n_bytes - first);
	sink->used += n_bytes;
	pthread_mutex_unlock(&sink->lock);
}

void kh_sink_publish(struct kh_sink *sink)
{
	pthread_mutex_lock(&sink->lock);
	if (sink->ready != sink->used) {
		sink->ready = sink->used;
		start(sink);
		pthread_cond_signal(&sink->filled);
	}
	pthread_mutex_unlock(&sink->lock);
}

uint64_t kh_sink_drain(struct kh_sink *sink, uint64_t timeout_ns)
{
	uint64_t end = now_ns() + timeout_ns, left;

	pthread_mutex_lock(&sink->lock);
	while (sink->ready && sink->started && !sink->ended && now_ns() < end)
		wait_until(&sink->taken, &sink->lock, end);
	left = sink->used;
	pthread_mutex_unlock(&sink->lock);
	return left;
}

struct kh_sink_counts kh_sink_counts(struct kh_sink *sink)
{
	struct kh_sink_counts counts;

	pthread_mutex_lock(&sink->lock);
	counts = sink->counts;
	counts.waiting = sink->used;
	counts.blocked_ns = __atomic_load_n(&sink->counts.blocked_ns, __ATOMIC_RELAXED);
	if (counts.blocked_ns)
		counts.blocked_ns = now_ns() - counts.blocked_ns + 1;
	pthread_mutex_unlock(&sink->lock);
	return counts;
}

void kh_sink_stop(struct kh_sink *sink)
{
	uint64_t end = now_ns() + STOP_NS;
	bool join;

	pthread_mutex_lock(&sink->lock);
	if (sink->stopping) {
		pthread_mutex_unlock(&sink->lock);
		return;
	}
	sink->stopping = true;
	sink->counts.dropped += sink->used;
	pthread_cond_broadcast(&sink->filled);
	pthread_cond_broadcast(&sink->taken);
	/* Repeat the kick: one that arrives before the system call does not interrupt it. */
	while (sink->started && !sink->ended && now_ns() < end) {
		if (sink->tid)
			kh_kick_thread(sink->tid);
		wait_until(&sink->taken, &sink->lock, now_ns() + RETRY_NS);
	}
	if (!sink->started)
		close(sink->fd);
	join = sink->started && sink->ended;
	sink->joined = join || !sink->started;
	pthread_mutex_unlock(&sink->lock);
	if (join)
		pthread_join(sink->thread, NULL);
	else if (sink->started)
		pthread_detach(sink->thread);
}

void kh_sink_free(struct kh_sink *sink)
{
	if (!sink)
		return;
	kh_sink_stop(sink);
	if (sink->joined) {
		destroy(sink);
		return;
	}
	/* The thread is still stuck: it frees the sink when it returns. */
	pthread_mutex_lock(&sink->lock);
	sink->orphan = true;
	pthread_mutex_unlock(&sink->lock);
}
