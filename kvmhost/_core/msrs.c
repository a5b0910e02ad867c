#include "msrs.h"

struct one_msr {
	struct kvm_msrs head;
	struct kvm_msr_entry entry;
};

static int32_t pass(int fd, unsigned long request, struct one_msr *one)
{
	int done;

	one->head.nmsrs = 1;
	do
		done = ioctl(fd, request, one);
	while (done < 0 && errno == EINTR);
	if (done < 0)
		return -errno;
	return done == 1 ? 0 : -ENXIO;
}

int64_t kh_msrs_scan(int vcpu_fd, uint64_t first, uint64_t end, struct kh_msr *msrs, int64_t room)
{
	int64_t found = 0;

	for (uint64_t index = first; index < end && found < room; index++) {
		struct one_msr one = { .entry = { .index = index } };

		if (!pass(vcpu_fd, KVM_GET_MSRS, &one))
			msrs[found++] = (struct kh_msr){ index, 0, one.entry.data };
	}
	return found;
}

void kh_msrs_get(int vcpu_fd, struct kh_msr *msrs, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++) {
		struct one_msr one = { .entry = { .index = msrs[i].index } };

		msrs[i].status = pass(vcpu_fd, KVM_GET_MSRS, &one);
		msrs[i].value = one.entry.data;
	}
}

void kh_msrs_set(int vcpu_fd, struct kh_msr *msrs, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++) {
		struct one_msr one = { .entry = { .index = msrs[i].index, .data = msrs[i].value } };

		msrs[i].status = pass(vcpu_fd, KVM_SET_MSRS, &one);
	}
}
