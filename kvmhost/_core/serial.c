/*
 * A 16550A UART: registers, FIFO, interrupt, loopback; output is passed to a sink
 * line by line. Transmission takes no time. Source: National Semiconductor PC16550D
 * data sheet.
 */
#include "serial.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define LINE_BYTES 4096
#define INPUT_BYTES 4096
#define LAST_NS 100000000ull	/* wait at the end for output that was not flushed */

enum { THR = 0, IER = 1, IIR = 2, LCR = 3, MCR = 4, LSR = 5, MSR = 6, SCR = 7 };

#define IER_RX 0x01
#define IER_TX 0x02
#define IER_LINE 0x04
#define IER_MODEM 0x08
#define IIR_NONE 0x01
#define IIR_TX 0x02
#define IIR_RX 0x04
#define IIR_LINE 0x06
#define IIR_TIMEOUT 0x0c
#define IIR_FIFO 0xc0
#define LCR_DLAB 0x80
#define MCR_OUT2 0x08
#define MCR_LOOP 0x10
#define LSR_DATA 0x01
#define LSR_OVERRUN 0x02
#define LSR_IDLE 0x60		/* THRE | TEMT: ready for the next byte */
#define MSR_CONNECTED 0xb0	/* DCD, DSR, CTS */

struct kh_serial {
	pthread_mutex_t lock;
	pthread_cond_t drained;	/* the guest has read input, or input was stopped */
	struct kh_sink *sink;	/* NULL: the output is discarded */
	int vm_fd;		/* for KVM_IRQ_LINE; -1: no interrupt */
	uint32_t irq, irq_level;
	int closing;
	uint32_t unsent;	/* bytes since the last publish to the sink */
	uint64_t log_size;
	struct kh_serial_counts counts;
	struct kh_serial_state now;
	uint32_t in_head, in_used;
	char *log;
	uint8_t input[INPUT_BYTES];
};

struct kh_serial *kh_serial_new(int fd, uint64_t log_size)
{
	struct kh_serial *serial = calloc(1, sizeof(*serial));

	if (!serial)
		return NULL;
	serial->log = calloc(1, log_size ? log_size : 1);
	serial->sink = fd >= 0 ? kh_sink_new(fd) : NULL;
	if (!serial->log || (fd >= 0 && !serial->sink)) {
		int error = errno;

		kh_sink_free(serial->sink);
		free(serial->log);
		free(serial);
		errno = error;
		return NULL;
	}
	pthread_mutex_init(&serial->lock, NULL);
	pthread_cond_init(&serial->drained, NULL);
	serial->vm_fd = -1;
	serial->log_size = log_size;
	serial->now.divisor = 12;
	serial->now.mcr = MCR_OUT2;
	serial->now.modem = MSR_CONNECTED;
	return serial;
}

static void publish(struct kh_serial *serial)
{
	serial->unsent = 0;
	kh_sink_publish(serial->sink);
}

static void transmit(struct kh_serial *serial, uint8_t byte)
{
	serial->counts.bytes++;
	if (serial->counts.logged < serial->log_size)
		serial->log[serial->counts.logged++] = byte;
	if (!serial->sink)
		return;
	kh_sink_put(serial->sink, (const char *)&byte, 1);
	serial->unsent++;
	if (byte == '\n' || serial->now.unbuffered || serial->unsent == LINE_BYTES)
		publish(serial);
}

static uint32_t trigger_level(const struct kh_serial *serial)
{
	static const uint8_t levels[] = { 1, 4, 8, 14 };

	return serial->now.fcr & 1 ? levels[serial->now.fcr >> 6] : 1;
}

/* What IIR shows: the reason of highest priority. */
static uint8_t reason(const struct kh_serial *serial)
{
	const struct kh_serial_state *now = &serial->now;

	if ((now->ier & IER_LINE) && now->overrun)
		return IIR_LINE;
	/* The line has no timing: input below the trigger level counts as timed out. */
	if ((now->ier & IER_RX) && serial->in_used)
		return serial->in_used < trigger_level(serial) ? IIR_TIMEOUT : IIR_RX;
	if ((now->ier & IER_TX) && now->tx_pending)
		return IIR_TX;
	if ((now->ier & IER_MODEM) && (now->modem & 0x0f))
		return 0;
	return IIR_NONE;
}

static void update_irq(struct kh_serial *serial)
{
	uint32_t level = reason(serial) != IIR_NONE && (serial->now.mcr & (MCR_OUT2 | MCR_LOOP)) == MCR_OUT2;
	struct kvm_irq_level line = { .irq = serial->irq, .level = level };

	if (serial->vm_fd < 0 || level == serial->irq_level)
		return;
	serial->irq_level = level;
	ioctl(serial->vm_fd, KVM_IRQ_LINE, &line);
}

static int receive(struct kh_serial *serial, uint8_t byte)
{
	if (serial->in_used == INPUT_BYTES) {
		serial->now.overrun = 1;
		return 0;
	}
	serial->input[(serial->in_head + serial->in_used++) % INPUT_BYTES] = byte;
	return 1;
}

static uint8_t take(struct kh_serial *serial)
{
	uint8_t byte;

	if (!serial->in_used)
		return 0;
	byte = serial->input[serial->in_head];
	serial->in_head = (serial->in_head + 1) % INPUT_BYTES;
	serial->in_used--;
	pthread_cond_signal(&serial->drained);
	return byte;
}

/* Modem lines as the guest sees them: its own, crossed over, in loopback. */
static void update_modem(struct kh_serial *serial)
{
	uint8_t mcr = serial->now.mcr, lines = MSR_CONNECTED, changed;

	if (mcr & MCR_LOOP)
		lines = (mcr & 0x0c) << 4 | (mcr & 0x02) << 3 | (mcr & 0x01) << 5;
	changed = (lines ^ serial->now.modem) >> 4;
	/* Only the trailing edge of the ring indicator counts. */
	if ((changed & 4) && (lines & 0x40))
		changed &= ~4;
	serial->now.modem = lines | (serial->now.modem & 0x0f) | changed;
}

static void write_fcr(struct kh_serial *serial, uint8_t value)
{
	if ((value ^ serial->now.fcr) & 1)
		value |= 6;
	/*
	 * What the host sent stays: a guest resets the FIFO as it starts, and only the time at
	 * which a byte arrives would show whether it was meant for that guest.
	 */
	if ((value & 2) && (serial->now.mcr & MCR_LOOP)) {
		serial->in_used = 0;
		serial->now.overrun = 0;
	}
	if (value & 4)
		serial->now.tx_pending = 1;
	serial->now.fcr = value & 1 ? value & 0xc9 : 0;
}

static void write_locked(struct kh_serial *serial, uint32_t offset, uint8_t value)
{
	struct kh_serial_state *now = &serial->now;
	int dlab = now->lcr & LCR_DLAB;

	switch (offset) {
	case THR:
		if (dlab) {
			now->divisor = (now->divisor & 0xff00) | value;
			break;
		}
		if (now->mcr & MCR_LOOP)
			receive(serial, value);
		else
			transmit(serial, value);
		now->tx_pending = 1;
		break;
	case IER:
		if (dlab) {
			now->divisor = (now->divisor & 0x00ff) | value << 8;
			break;
		}
		if ((value & ~now->ier) & IER_TX)
			now->tx_pending = 1;
		now->ier = value & 0x0f;
		break;
	case IIR:
		write_fcr(serial, value);
		break;
	case LCR:
		now->lcr = value;
		break;
	case MCR:
		now->mcr = value & 0x1f;
		update_modem(serial);
		break;
	case SCR:
		now->scratch = value;
		break;
	}
}

static uint8_t read_locked(struct kh_serial *serial, uint32_t offset)
{
	struct kh_serial_state *now = &serial->now;
	int dlab = now->lcr & LCR_DLAB;
	uint8_t value;

	switch (offset) {
	case THR:
		return dlab ? now->divisor & 0xff : take(serial);
	case IER:
		return dlab ? now->divisor >> 8 : now->ier;
	case IIR:
		value = reason(serial);
		if (value == IIR_TX)
			now->tx_pending = 0;
		return value | (now->fcr & 1 ? IIR_FIFO : 0);
	case LCR:
		return now->lcr;
	case MCR:
		return now->mcr;
	case LSR:
		value = LSR_IDLE | (serial->in_used ? LSR_DATA : 0) | (now->overrun ? LSR_OVERRUN : 0);
		now->overrun = 0;
		return value;
	case MSR:
		value = now->modem;
		now->modem &= 0xf0;
		return value;
	default:
		return now->scratch;
	}
}

void kh_serial_out(struct kh_serial *serial, uint32_t offset, uint8_t value)
{
	/* Before the lock, so that other threads do not wait for the reader as well. */
	if (serial->sink && (offset & 7) == THR)
		kh_sink_wait_room(serial->sink);
	pthread_mutex_lock(&serial->lock);
	write_locked(serial, offset & 7, value);
	update_irq(serial);
	pthread_mutex_unlock(&serial->lock);
}

uint8_t kh_serial_in(struct kh_serial *serial, uint32_t offset)
{
	uint8_t value;

	pthread_mutex_lock(&serial->lock);
	value = read_locked(serial, offset & 7);
	update_irq(serial);
	pthread_mutex_unlock(&serial->lock);
	return value;
}

void kh_serial_write(struct kh_serial *serial, const uint8_t *data, uint64_t n_bytes)
{
	for (uint64_t done = 0; done < n_bytes;) {
		uint64_t end = n_bytes - done < LINE_BYTES ? n_bytes : done + LINE_BYTES;

		if (serial->sink)
			kh_sink_wait_room(serial->sink);
		pthread_mutex_lock(&serial->lock);
		while (done < end)
			transmit(serial, data[done++]);
		pthread_mutex_unlock(&serial->lock);
	}
}

uint64_t kh_serial_receive(struct kh_serial *serial, const uint8_t *data, uint64_t n_bytes)
{
	uint64_t done = 0;

	pthread_mutex_lock(&serial->lock);
	while (done < n_bytes && !serial->closing) {
		if (serial->in_used < INPUT_BYTES) {
			receive(serial, data[done++]);
			continue;
		}
		update_irq(serial);
		pthread_cond_wait(&serial->drained, &serial->lock);
	}
	update_irq(serial);
	pthread_mutex_unlock(&serial->lock);
	return done;
}

void kh_serial_stop_input(struct kh_serial *serial)
{
	pthread_mutex_lock(&serial->lock);
	serial->closing = 1;
	pthread_cond_broadcast(&serial->drained);
	pthread_mutex_unlock(&serial->lock);
}

void kh_serial_set_irq(struct kh_serial *serial, int vm_fd, uint32_t irq)
{
	pthread_mutex_lock(&serial->lock);
	serial->vm_fd = vm_fd;
	serial->irq = irq;
	serial->irq_level = 0;
	update_irq(serial);
	pthread_mutex_unlock(&serial->lock);
}

void kh_serial_set_unbuffered(struct kh_serial *serial, int on)
{
	pthread_mutex_lock(&serial->lock);
	serial->now.unbuffered = on;
	pthread_mutex_unlock(&serial->lock);
}

uint64_t kh_serial_save(struct kh_serial *serial, struct kh_serial_state *out, uint8_t *input)
{
	uint64_t n_bytes;

	pthread_mutex_lock(&serial->lock);
	*out = serial->now;
	n_bytes = serial->in_used;
	for (uint64_t i = 0; i < n_bytes; i++)
		input[i] = serial->input[(serial->in_head + i) % INPUT_BYTES];
	pthread_mutex_unlock(&serial->lock);
	return n_bytes;
}

void kh_serial_load(struct kh_serial *serial, const struct kh_serial_state *from,
		    const uint8_t *input, uint64_t n_bytes)
{
	uint8_t unbuffered;

	pthread_mutex_lock(&serial->lock);
	unbuffered = serial->now.unbuffered;
	serial->now = *from;
	serial->now.unbuffered = unbuffered;
	serial->in_head = 0;
	serial->in_used = n_bytes < INPUT_BYTES ? n_bytes : INPUT_BYTES;
	memcpy(serial->input, input, serial->in_used);
	update_irq(serial);
	pthread_mutex_unlock(&serial->lock);
}

void kh_serial_flush(struct kh_serial *serial)
{
	pthread_mutex_lock(&serial->lock);
	if (serial->sink)
		publish(serial);
	pthread_mutex_unlock(&serial->lock);
}

uint64_t kh_serial_drain(struct kh_serial *serial, uint64_t timeout_ns)
{
	return serial->sink ? kh_sink_drain(serial->sink, timeout_ns) : 0;
}

void kh_serial_stop_output(struct kh_serial *serial)
{
	if (serial->sink)
		kh_sink_stop(serial->sink);
}

struct kh_sink_counts kh_serial_output(struct kh_serial *serial)
{
	struct kh_sink_counts none = { 0 };

	return serial->sink ? kh_sink_counts(serial->sink) : none;
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
	kh_serial_drain(serial, LAST_NS);
	kh_sink_free(serial->sink);
	pthread_cond_destroy(&serial->drained);
	pthread_mutex_destroy(&serial->lock);
	free(serial->log);
	free(serial);
}
