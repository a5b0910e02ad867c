/*
 * MSRs of a vCPU, one by one: KVM_GET_MSRS and KVM_SET_MSRS stop at the first MSR
 * that they refuse, and a snapshot needs the result for each.
 */
#ifndef KVMHOST_MSRS_H
#define KVMHOST_MSRS_H

#include "compat.h"

struct kh_msr {
	uint32_t index;
	int32_t status;		/* 0, or -errno; -ENXIO: KVM refuses this MSR */
	uint64_t value;
};

/* Find the MSRs of [first, end) that can be read. Returns how many, at most room. */
int64_t kh_msrs_scan(int vcpu_fd, uint64_t first, uint64_t end, struct kh_msr *msrs, int64_t room);
/* Read, or set, each; status has the result of each. */
void kh_msrs_get(int vcpu_fd, struct kh_msr *msrs, uint64_t n);
void kh_msrs_set(int vcpu_fd, struct kh_msr *msrs, uint64_t n);

#endif
