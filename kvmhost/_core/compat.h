/*
 * What the core needs of the kernel's headers, with fallbacks for constants
 * that are newer than the installed ones. Each fallback names its commit.
 */
#ifndef KVMHOST_COMPAT_H
#define KVMHOST_COMPAT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/types.h>

/* Since commit 2d5de004e009 ("userfaultfd: add /dev/userfaultfd for
 * fine grained access control") (in v6.1). */
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* Since commit 1a4e58cce84e ("mm: introduce MADV_PAGEOUT") (in v5.4). */
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

/* Since commit 4ca9b3859dac ("mm/madvise: introduce MADV_POPULATE_(READ|WRITE) to
 * prefault page tables") (in v5.14); an older kernel refuses, and nothing is lost. */
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

/* Since commit 2bad466cc9d9 ("mm/uffd: UFFD_FEATURE_WP_UNPOPULATED") (in v6.4). */
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif

/* Since commit d61ea1cb0095 ("userfaultfd: UFFD_FEATURE_WP_ASYNC") (in v6.7). */
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif

/* Since commit fc71884a5f59 ("mm: userfaultfd: add new UFFDIO_POISON ioctl") (in v6.6). */
#ifndef UFFDIO_POISON
struct uffdio_poison {
	struct uffdio_range range;
	uint64_t mode;
	int64_t updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif

/* Since commit 52526ca7fdb9 ("fs/proc/task_mmu: implement IOCTL to get and
 * optionally clear info about PTEs") (in v6.7). */
#ifndef PAGEMAP_SCAN
struct page_region {
	uint64_t start;
	uint64_t end;
	uint64_t categories;
};

struct pm_scan_arg {
	uint64_t size;
	uint64_t flags;
	uint64_t start;
	uint64_t end;
	uint64_t walk_end;
	uint64_t vec;
	uint64_t vec_len;
	uint64_t max_pages;
	uint64_t category_inverted;
	uint64_t category_mask;
	uint64_t category_anyof_mask;
	uint64_t return_mask;
};

#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#define PAGE_IS_WPALLOWED (1 << 0)
#define PAGE_IS_WRITTEN (1 << 1)
#define PAGE_IS_FILE (1 << 2)
#define PAGE_IS_PRESENT (1 << 3)
#define PAGE_IS_SWAPPED (1 << 4)
#define PAGE_IS_PFNZERO (1 << 5)
#define PAGE_IS_HUGE (1 << 6)
#define PAGE_IS_SOFT_DIRTY (1 << 7)
#define PM_SCAN_WP_MATCHING (1 << 0)
#define PM_SCAN_CHECK_WPASYNC (1 << 1)
#endif

/* Since commit fb04a1eddb1a ("KVM: X86: Implement ring-based dirty memory tracking") (in v5.11). */
#ifndef KVM_DIRTY_LOG_PAGE_OFFSET
#define KVM_DIRTY_LOG_PAGE_OFFSET 0
#endif

/* Since commit 16f95f3b95ca ("KVM: Add KVM_EXIT_MEMORY_FAULT exit to report
 * faults to userspace") (in v6.8). */
#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif

#endif
