/* Transmit half of a 16550 UART. */
#include "vcpu.h"

#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LINE_BYTES 4096

struct kh_serial {
	pthread_mutex_t lock;
	int fd;
	uint32_t used;
	uint64_t log_size;
	struct kh_serial_counts counts;
	char *log;
	char line[LINE_BYTES];
};

struct kh_serial *kh_serial_new(int fd, uint64_t log_size)
{
	struct kh_serial *serial = calloc(1, sizeof(*serial));

	if (!serial)
		return NULL;
	serial->log = calloc(1, log_size ? log_size : 1);
	if (!serial->log) {
		free(serial);
		return NULL;
	}
	pthread_mutex_init(&serial->lock, NULL);
	serial->fd = fd;
	serial->log_size = log_size;
	return serial;
}

/* The reader may be slow or gone: wait for it a while, then count what it missed. */
static void flush_locked(struct kh_serial *serial)
{
	uint32_t done = 0;

	while (serial->fd >= 0 && done < serial->used) {
		ssize_t n = write(serial->fd, serial->line + done, serial->used - done);

		if (n > 0) {
			done += n;
		} else if (n < 0 && errno == EAGAIN) {
			struct pollfd wait = { .fd = serial->fd, .events = POLLOUT };

			if (poll(&wait, 1, 1000) <= 0)
				break;
		} else if (n < 0 && errno != EINTR) {
			break;
		}
	}
	if (serial->fd >= 0)
		serial->counts.lost += serial->used - done;
	serial->used = 0;
}

void kh_serial_write(struct kh_serial *serial, const uint8_t *data, uint64_t n_bytes)
{
	pthread_mutex_lock(&serial->lock);
	for (uint64_t i = 0; i < n_bytes; i++) {
		serial->counts.bytes++;
		if (serial->counts.logged < serial->log_size)
			serial->log[serial->counts.logged++] = data[i];
		serial->line[serial->used++] = data[i];
		if (data[i] == '\n' || serial->used == LINE_BYTES)
			flush_locked(serial);
	}
	pthread_mutex_unlock(&serial->lock);
}

void kh_serial_flush(struct kh_serial *serial)
{
	pthread_mutex_lock(&serial->lock);
	flush_locked(serial);
	pthread_mutex_unlock(&serial->lock);
}

uint64_t kh_serial_read_log(struct kh_serial *serial, char *buffer, uint64_t size)
{
	uint64_t n_bytes;

	pthread_mutex_lock(&serial->lock);
	n_bytes = serial->counts.logged < size ? serial->counts.logged : size;
	memcpy(buffer, serial->log, n_bytes);
	pthread_mutex_unlock(&serial->lock);
	return n_bytes;
}

struct kh_serial_counts kh_serial_counts(struct kh_serial *serial)
{
	struct kh_serial_counts counts;

	pthread_mutex_lock(&serial->lock);
	counts = serial->counts;
	pthread_mutex_unlock(&serial->lock);
	return counts;
}

void kh_serial_free(struct kh_serial *serial)
{
	if (!serial)
		return;
	kh_serial_flush(serial);
	pthread_mutex_destroy(&serial->lock);
	free(serial->log);
	free(serial);
}
