#include "bench_exits.h"

int64_t kh_bench_exits(int vcpu_fd, struct kvm_run *run, uint16_t last_port)
{
	int64_t n = 0;

	for (;;) {
		if (ioctl(vcpu_fd, KVM_RUN, 0) < 0)
			return -errno;
		if (run->exit_reason != KVM_EXIT_IO)
			return -EPROTO;
		if (run->io.port == last_port)
			return n;
		n++;
	}
}
