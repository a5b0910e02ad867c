/* A minimal C loop that counts a guest's port writes. */
#ifndef KVMHOST_BENCH_EXITS_H
#define KVMHOST_BENCH_EXITS_H

#include "compat.h"

/*
 * KVM_RUN in a loop until the guest writes to last_port. Returns the number of
 * port exits before that, or -errno (-EPROTO for an exit of another kind).
 */
int64_t kh_bench_exits(int vcpu_fd, struct kvm_run *run, uint16_t last_port);

#endif
