/*
 * A 16550A serial port. The registers are the guest's side; receive, stop_input and
 * the log are the host's. Opaque, locks itself.
 */
#ifndef KVMHOST_SERIAL_H
#define KVMHOST_SERIAL_H

#include "compat.h"
#include "sink.h"

#define KH_SERIAL_INPUT 4096

struct kh_serial;

/* Counters of a serial line. */
struct kh_serial_counts {
	uint64_t bytes;		/* transmitted by the guest */
	uint64_t logged;	/* bytes in the log */
};

/* Registers, by the data sheet's names. */
struct kh_serial_state {
	uint16_t divisor;
	uint8_t ier, fcr, lcr, mcr, scratch;
	uint8_t modem;		/* MSR */
	uint8_t overrun;	/* LSR bit 1 */
	uint8_t tx_pending;	/* the transmitter became empty: THRE interrupt pending */
	uint8_t unbuffered;	/* the host's choice: pass each byte on at once */
};

struct kh_serial *kh_serial_new(int fd, uint64_t log_size);
/* Register access; the offset counts from the base port, modulo 8. */
void kh_serial_out(struct kh_serial *serial, uint32_t offset, uint8_t value);
uint8_t kh_serial_in(struct kh_serial *serial, uint32_t offset);
/* Transmit bytes, as a guest does; waits a moment for a reader, see sink.h. */
void kh_serial_write(struct kh_serial *serial, const uint8_t *data, uint64_t n_bytes);
/* Pass input to the guest; waits while its buffer is full. Returns the bytes accepted. */
uint64_t kh_serial_receive(struct kh_serial *serial, const uint8_t *data, uint64_t n_bytes);
/* Accept no more input: every kh_serial_receive returns immediately from now on. */
void kh_serial_stop_input(struct kh_serial *serial);
/* Connect the interrupt to an in-kernel irqchip's input; vm_fd -1: to nothing. */
void kh_serial_set_irq(struct kh_serial *serial, int vm_fd, uint32_t irq);
/* Pass each byte on at once, not line by line. */
void kh_serial_set_unbuffered(struct kh_serial *serial, int on);
/* Copy the state out; input has room for KH_SERIAL_INPUT bytes, the count is returned. */
uint64_t kh_serial_save(struct kh_serial *serial, struct kh_serial_state *out, uint8_t *input);
void kh_serial_load(struct kh_serial *serial, const struct kh_serial_state *from,
		    const uint8_t *input, uint64_t n_bytes);
/* Publish an incomplete line; does not wait. */
void kh_serial_flush(struct kh_serial *serial);
/* Wait until the flushed output is written, up to a timeout. Returns the bytes still pending. */
uint64_t kh_serial_drain(struct kh_serial *serial, uint64_t timeout_ns);
/* Stop writing; pending output is dropped. */
void kh_serial_stop_output(struct kh_serial *serial);
/* The counters of the output. */
struct kh_sink_counts kh_serial_output(struct kh_serial *serial);
/* Copy up to size bytes of the log (the first bytes sent) out. */
uint64_t kh_serial_read_log(struct kh_serial *serial, char *buffer, uint64_t size);
struct kh_serial_counts kh_serial_counts(struct kh_serial *serial);
void kh_serial_free(struct kh_serial *serial);

#endif
