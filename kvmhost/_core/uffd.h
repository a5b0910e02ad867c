/* userfaultfd: opening, registering, and the ioctls on ranges. */
#ifndef KVMHOST_UFFD_H
#define KVMHOST_UFFD_H

#include "compat.h"

#define KH_UFFD_MISSING 1
#define KH_UFFD_WP 2
#define KH_UFFD_MINOR 4

/* UFFD_FEATURE_MINOR_SHMEM: agreed on where the kernel offers it (Linux 5.14). */
#define KH_UFFD_FEATURE_MINOR 1024

/*
 * Open a userfaultfd that also delivers faults of kernel mode (KVM's are), and
 * agree on the features; *features gets all that the kernel offers.
 * Returns the descriptor or -errno: EPERM where neither /dev/userfaultfd nor
 * the system call is allowed, EOPNOTSUPP where shmem write-protect is missing.
 */
int kh_uffd_open(uint64_t *features);
/* Whether a userfaultfd that delivers only user-mode faults can be opened. */
int kh_uffd_user_mode_only(void);
/* Register a range for KH_UFFD_* faults; may be called again to add a mode. */
int kh_uffd_register(int uffd, uint64_t address, uint64_t n_bytes, int modes);
int kh_uffd_unregister(int uffd, uint64_t address, uint64_t n_bytes);
/* Write-protect a range, or remove the protection and wake the waiters. */
int kh_uffd_write_protect(int uffd, uint64_t address, uint64_t n_bytes, int protect);
/* Fill one missing page without waking the waiters; EEXIST if another thread filled it first. */
int kh_uffd_copy(int uffd, uint64_t address, const void *page);
/* Fill missing pages in a row; *done is the number of bytes filled, also on an error. */
int kh_uffd_copy_range(int uffd, uint64_t address, const void *pages, uint64_t n_bytes,
		       uint64_t *done);
int kh_uffd_zero(int uffd, uint64_t address);
/* Map a page that the memfd holds, and wake; EEXIST if it is mapped, EFAULT if it is a hole. */
int kh_uffd_continue(int uffd, uint64_t address);
/*
 * Make a touch of a missing page raise SIGBUS, and wake the waiters. If the kernel
 * does not support this, the page of the mapping is replaced by one of an empty
 * file.
 */
int kh_uffd_poison(int uffd, uint64_t address);
/* Have kh_uffd_poison do without UFFDIO_POISON, as it does before Linux 6.6. For tests. */
void kh_uffd_force_plain(int plain);
int kh_uffd_wake(int uffd, uint64_t address);

#endif
