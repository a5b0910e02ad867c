#include "vcpu.h"

#include "kick.h"

#include <stdbool.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int kh_vcpu_map(struct kh_vcpu *vcpu, int fd, uint64_t run_bytes)
{
	void *run = mmap(NULL, run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (run == MAP_FAILED)
		return -errno;
	vcpu->fd = fd;
	vcpu->run = run;
	vcpu->run_bytes = run_bytes;
	return 0;
}

static const struct kh_port *find_port(const struct kh_bus *bus, uint16_t port)
{
	for (uint32_t i = 0; bus && i < bus->n_ports; i++)
		if ((uint16_t)(port - bus->ports[i].port) < bus->ports[i].n_ports)
			return &bus->ports[i];
	return NULL;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void ring_doorbell(struct kh_vcpu *vcpu, const uint8_t *data, uint8_t size)
{
	uint32_t value = 0;

	memcpy(&value, data, size < sizeof(value) ? size : sizeof(value));
	__atomic_store_n(&vcpu->doorbell_value, value, __ATOMIC_RELAXED);
	__atomic_store_n(&vcpu->doorbell_ns, now_ns(), __ATOMIC_RELAXED);
	__atomic_fetch_add(&vcpu->doorbells, 1, __ATOMIC_RELEASE);
}

/* A wide access is split into bytes for consecutive registers, as on an ISA bus. */
static void access_serial(const struct kvm_run *run, const struct kh_port *port, uint8_t *data,
			  uint64_t n_bytes)
{
	uint32_t first = run->io.port - port->port;

	for (uint64_t i = 0; i < n_bytes; i++) {
		uint32_t offset = first + i % run->io.size;

		if (run->io.direction == KVM_EXIT_IO_OUT)
			kh_serial_out(port->serial, offset, data[i]);
		else
			data[i] = kh_serial_in(port->serial, offset);
	}
}

/* Handle a port exit here if the bus says so; 0 if Python must handle it. */
static int handle_port(struct kh_vcpu *vcpu, const struct kh_bus *bus)
{
	struct kvm_run *run = vcpu->run;
	const struct kh_port *port = find_port(bus, run->io.port);
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	uint64_t n_bytes = (uint64_t)run->io.size * run->io.count;

	if (!port)
		return 0;
	if (port->kind == KH_PORT_SERIAL) {
		access_serial(run, port, data, n_bytes);
		return 1;
	}
	if (run->io.direction == KVM_EXIT_IO_IN) {
		memset(data, 0xff, n_bytes);
		return 1;
	}
	if (port->kind == KH_PORT_DOORBELL) {
		ring_doorbell(vcpu, data, run->io.size);
		return !__atomic_load_n(&vcpu->stop_at_doorbell, __ATOMIC_RELAXED);
	}
	return 1;
}

static void decode_io(struct kh_exit *out, struct kvm_run *run)
{
	uint64_t n_bytes = (uint64_t)run->io.size * run->io.count;

	out->is_write = run->io.direction == KVM_EXIT_IO_OUT;
	out->size = run->io.size;
	out->port = run->io.port;
	out->count = run->io.count;
	memcpy(out->data, (uint8_t *)run + run->io.data_offset,
	       n_bytes < sizeof(out->data) ? n_bytes : sizeof(out->data));
}

static void decode_words(struct kh_exit *out, const uint64_t *words, uint32_t n)
{
	out->n_internal = n < KH_INTERNAL_DATA ? n : KH_INTERNAL_DATA;
	memcpy(out->internal, words, out->n_internal * sizeof(uint64_t));
}

/* Exits that the caller enabled: debugging, hypercalls, MSRs. */
static void decode_asked(struct kh_exit *out, struct kvm_run *run)
{
	switch (run->exit_reason) {
	case KVM_EXIT_DEBUG:
		out->detail = run->debug.arch.exception;
		out->address = run->debug.arch.pc;
		out->internal[0] = run->debug.arch.dr6;
		out->internal[1] = run->debug.arch.dr7;
		break;
	case KVM_EXIT_HYPERCALL:
		out->detail = run->hypercall.nr;
		out->is_write = run->hypercall.longmode & 1;
		decode_words(out, (const uint64_t *)run->hypercall.args, 6);
		break;
	case KVM_EXIT_X86_RDMSR:
	case KVM_EXIT_X86_WRMSR:
		out->is_write = run->exit_reason == KVM_EXIT_X86_WRMSR;
		out->detail = run->msr.reason;
		out->address = run->msr.index;
		out->internal[0] = run->msr.data;
		break;
	case KVM_EXIT_IOAPIC_EOI:
		out->detail = run->eoi.vector;
		break;
	case KVM_EXIT_TPR_ACCESS:
		out->address = run->tpr_access.rip;
		out->is_write = !!run->tpr_access.is_write;
		break;
	}
}

static void decode(struct kh_vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	struct kh_exit *out = &vcpu->exit;

	memset(out, 0, sizeof(*out));
	out->reason = run->exit_reason;
	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		decode_io(out, run);
		break;
	case KVM_EXIT_MMIO:
		out->is_write = run->mmio.is_write;
		out->size = run->mmio.len;
		out->count = 1;
		out->address = run->mmio.phys_addr;
		memcpy(out->data, run->mmio.data, sizeof(run->mmio.data));
		break;
	case KVM_EXIT_INTERNAL_ERROR:
		out->detail = run->internal.suberror;
		decode_words(out, (const uint64_t *)run->internal.data, run->internal.ndata);
		break;
	case KVM_EXIT_FAIL_ENTRY:
		out->detail = run->fail_entry.hardware_entry_failure_reason;
		break;
	case KVM_EXIT_SYSTEM_EVENT:
		out->detail = run->system_event.type;
		decode_words(out, (const uint64_t *)run->system_event.data,
			     run->system_event.ndata);
		break;
	case KVM_EXIT_DEBUG:
	case KVM_EXIT_HYPERCALL:
	case KVM_EXIT_X86_RDMSR:
	case KVM_EXIT_X86_WRMSR:
	case KVM_EXIT_IOAPIC_EOI:
	case KVM_EXIT_TPR_ACCESS:
		decode_asked(out, run);
		break;
	case KVM_EXIT_MEMORY_FAULT: {
		/* flags, gpa, size: newer than the headers this may be built with. */
		const uint64_t *fault = (const uint64_t *)&run->mmio;

		out->detail = fault[0];
		out->address = fault[1];
		decode_words(out, fault + 2, 1);
		break;
	}
	default:
		out->detail = run->hw.hardware_exit_reason;
	}
}

/*
 * Kicks. immediate_exit is the one flag: kickers only raise it, only the thread
 * that runs the vCPU lowers it, and only before it looks at what it was kicked
 * for. It covers a thread that is about to enter KVM_RUN; the signal covers one
 * that is in it. A signal that comes after its flag was lowered is one return too
 * many, which costs a loop. The steps in brackets are those of the model in
 * kvmhost/engine/kickmodel.py, which takes them in every order.
 */
static bool lower_flag(struct kh_vcpu *vcpu)
{
	return __atomic_exchange_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
}

/* Advance past the store that faulted, if it is the one to skip: 1, 0 or -errno. */
static int skip_store(struct kh_vcpu *vcpu)
{
	uint32_t n_bytes = __atomic_load_n(&vcpu->skip_bytes, __ATOMIC_ACQUIRE);
	struct kvm_regs regs;

	if (!n_bytes)
		return 0;
	if (ioctl(vcpu->fd, KVM_GET_REGS, &regs))
		return -errno;
	if (regs.rip != __atomic_load_n(&vcpu->skip_rip, __ATOMIC_RELAXED))
		return 0;
	regs.rip += n_bytes;
	return ioctl(vcpu->fd, KVM_SET_REGS, &regs) ? -errno : 1;
}

/*
 * KVM_RUN failed with EFAULT: the host has no page for what the guest touched, or one
 * that the access may not use. The guest is before the instruction, and running it
 * again repeats the access. KVM describes the fault only if it says so in exit_reason.
 */
static int on_fault(struct kh_vcpu *vcpu)
{
	int skipped;

	__atomic_fetch_add(&vcpu->faults, 1, __ATOMIC_RELAXED);
	skipped = skip_store(vcpu);
	if (skipped)
		return skipped;
	if (vcpu->run->exit_reason == KVM_EXIT_MEMORY_FAULT) {
		decode(vcpu);
		return 0;
	}
	memset(&vcpu->exit, 0, sizeof(vcpu->exit));
	vcpu->exit.reason = KVM_EXIT_MEMORY_FAULT;
	return 0;
}

static int run_loop(struct kh_vcpu *vcpu, struct kh_bus *bus)
{
	for (;;) {
		int result = ioctl(vcpu->fd, KVM_RUN, 0); /* [enter], [guest] */

		if (result < 0) {
			if (errno == EAGAIN)
				continue;
			if (errno == EFAULT) {
				result = on_fault(vcpu);
				if (result > 0)
					continue;
				return result;
			}
			if (errno != EINTR)
				return -errno;
			/* [lower] */
			return lower_flag(vcpu) ? KH_RUN_KICKED : -EINTR;
		}
		__atomic_fetch_add(&vcpu->exits, 1, __ATOMIC_RELAXED);
		if (vcpu->run->exit_reason == KVM_EXIT_DIRTY_RING_FULL && vcpu->rings) {
			int64_t taken = kh_rings_on_full(vcpu->rings);

			if (taken < 0)
				return (int)taken;
			continue;
		}
		if (vcpu->run->exit_reason != KVM_EXIT_IO || !handle_port(vcpu, bus))
			break;
	}
	decode(vcpu);
	return KH_RUN_EXIT;
}

int kh_vcpu_run(struct kh_vcpu *vcpu, struct kh_bus *bus)
{
	int result;

	/* [publish]. The kernel's load of the flag is no atomic of this program: the
	 * fence keeps it behind the store of tid, as kh_vcpu_kick() relies on. */
	__atomic_store_n(&vcpu->tid, (int)syscall(SYS_gettid), __ATOMIC_SEQ_CST);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	result = run_loop(vcpu, bus);
	__atomic_store_n(&vcpu->tid, 0, __ATOMIC_SEQ_CST); /* [withdraw] */
	return result;
}

void kh_vcpu_skip_faults(struct kh_vcpu *vcpu, uint64_t rip, uint32_t n_bytes)
{
	__atomic_store_n(&vcpu->skip_bytes, 0, __ATOMIC_RELEASE);
	__atomic_store_n(&vcpu->skip_rip, rip, __ATOMIC_RELAXED);
	__atomic_store_n(&vcpu->skip_bytes, n_bytes, __ATOMIC_RELEASE);
}

int kh_vcpu_kick(struct kh_vcpu *vcpu)
{
	int tid;

	if (!vcpu->run)
		return 0;
	__atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST); /* [raise] */
	tid = __atomic_load_n(&vcpu->tid, __ATOMIC_SEQ_CST); /* [look] */
	return tid ? kh_kick_thread(tid) : 0; /* [signal] */
}

void kh_vcpu_complete_read(struct kh_vcpu *vcpu, const uint8_t *data, uint64_t n_bytes)
{
	struct kvm_run *run = vcpu->run;

	if (!run)
		return;
	if (run->exit_reason == KVM_EXIT_IO) {
		uint64_t size = (uint64_t)run->io.size * run->io.count;

		memcpy((uint8_t *)run + run->io.data_offset, data, n_bytes < size ? n_bytes : size);
	} else if (run->exit_reason == KVM_EXIT_MMIO) {
		memcpy(run->mmio.data, data, n_bytes < 8 ? n_bytes : 8);
	}
}

void kh_vcpu_complete_msr(struct kh_vcpu *vcpu, uint64_t value, int error)
{
	struct kvm_run *run = vcpu->run;

	if (!run)
		return;
	if (run->exit_reason != KVM_EXIT_X86_RDMSR && run->exit_reason != KVM_EXIT_X86_WRMSR)
		return;
	if (run->exit_reason == KVM_EXIT_X86_RDMSR)
		run->msr.data = value;
	run->msr.error = !!error;
}

void kh_vcpu_complete_hypercall(struct kh_vcpu *vcpu, uint64_t result)
{
	if (vcpu->run && vcpu->run->exit_reason == KVM_EXIT_HYPERCALL)
		vcpu->run->hypercall.ret = result;
}
