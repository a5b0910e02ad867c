/*
 * The vCPU run loop. It runs with no interpreter lock held, handles the exits
 * that need no decision (serial output, doorbells) and returns for the rest.
 */
#ifndef KVMHOST_VCPU_H
#define KVMHOST_VCPU_H

#include "compat.h"
#include "dirtyring.h"
#include "serial.h"

/* How a port on the bus is handled. */
#define KH_PORT_SERIAL 1
#define KH_PORT_DOORBELL 2
#define KH_PORT_IGNORE 3

#define KH_BUS_PORTS 16
#define KH_INTERNAL_DATA 16
#define KH_IO_DATA 256

/* Results of kh_vcpu_run other than -errno. */
#define KH_RUN_EXIT 0
#define KH_RUN_KICKED 1

struct kh_port {
	uint16_t port;
	uint16_t n_ports;
	uint32_t kind;		/* KH_PORT_* */
	struct kh_serial *serial;
};

/* Ports that C handles, shared by the vCPUs of a VM and fixed before they run. */
struct kh_bus {
	uint32_t n_ports;
	struct kh_port ports[KH_BUS_PORTS];
};

/* The last exit, decoded out of struct kvm_run. */
struct kh_exit {
	uint32_t reason;	/* KVM_EXIT_* */
	uint8_t is_write;
	uint8_t size;		/* bytes of one access */
	uint16_t port;
	uint32_t count;		/* accesses in data */
	uint64_t address;	/* gpa of an MMIO access or a memory fault; rip; MSR */
	uint64_t detail;	/* suberror, hardware reason, event type, flags, hypercall */
	uint32_t n_internal;	/* 0 for a memory fault that KVM did not describe */
	uint64_t internal[KH_INTERNAL_DATA];
	uint8_t data[KH_IO_DATA];	/* what was written, little-endian */
};

struct kh_vcpu {
	int fd;
	int tid;		/* thread inside kh_vcpu_run, or 0 */
	int stop_at_doorbell;	/* return at doorbells instead of only counting them */
	struct kvm_run *run;
	uint64_t run_bytes;
	uint64_t exits;		/* number of returns of KVM_RUN to this loop */
	uint64_t doorbells;
	uint64_t doorbell_value;	/* last one */
	uint64_t doorbell_ns;	/* CLOCK_MONOTONIC of the last one */
	uint64_t faults;	/* times that KVM_RUN failed with EFAULT */
	uint64_t skip_rip;	/* see kh_vcpu_skip_faults */
	uint32_t skip_bytes;
	struct kh_rings *rings;	/* the VM's dirty rings, or NULL */
	struct kh_exit exit;
};

/* Map struct kvm_run; the caller unmaps run_bytes of it. */
int kh_vcpu_map(struct kh_vcpu *vcpu, int fd, uint64_t run_bytes);
/* Run until an exit that the bus does not handle, a kick, or -errno. */
int kh_vcpu_run(struct kh_vcpu *vcpu, struct kh_bus *bus);
/*
 * Skip the instruction of n_bytes at rip whenever it touches memory that the host
 * cannot provide, instead of returning; n_bytes 0: return. Any thread.
 */
void kh_vcpu_skip_faults(struct kh_vcpu *vcpu, uint64_t rip, uint32_t n_bytes);
/* Make kh_vcpu_run return, now or at its next call. Any thread. */
int kh_vcpu_kick(struct kh_vcpu *vcpu);
/* Give the value that a pending port or MMIO read returns; a short one ends in zeros. */
void kh_vcpu_complete_read(struct kh_vcpu *vcpu, const uint8_t *data, uint64_t n_bytes);
/* Give the value that a pending MSR read returns, or refuse the access (#GP). */
void kh_vcpu_complete_msr(struct kh_vcpu *vcpu, uint64_t value, int error);
/* Give what a pending hypercall returns. */
void kh_vcpu_complete_hypercall(struct kh_vcpu *vcpu, uint64_t result);

#endif
