#include "uffd.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE_BYTES 4096ull
#define WANTED (UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_PAGEFAULT_FLAG_WP | \
		UFFD_FEATURE_WP_HUGETLBFS_SHMEM)

static int open_descriptor(void)
{
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	int uffd;

	if (device >= 0) {
		uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
		close(device);
		if (uffd >= 0)
			return uffd;
	}
	uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	return uffd < 0 ? -errno : uffd;
}

/* UFFDIO_API fixes the features of a descriptor, so the query uses a separate one. */
static int offered_features(uint64_t *features)
{
	struct uffdio_api api = { .api = UFFD_API };
	int uffd = open_descriptor();

	if (uffd < 0)
		return uffd;
	if (ioctl(uffd, UFFDIO_API, &api)) {
		int error = errno;

		close(uffd);
		return -error;
	}
	close(uffd);
	*features = api.features;
	return (api.features & WANTED) == WANTED ? 0 : -EOPNOTSUPP;
}

int kh_uffd_user_mode_only(void)
{
	/* Since commit 37cd0575b851 ("userfaultfd: add UFFD_USER_MODE_ONLY") (in v5.11). */
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1);

	if (uffd < 0)
		return 0;
	close(uffd);
	return 1;
}

int kh_uffd_open(uint64_t *features)
{
	struct uffdio_api api = { .api = UFFD_API };
	int uffd = offered_features(features);

	if (uffd < 0)
		return uffd;
	api.features = WANTED | (*features & UFFD_FEATURE_MINOR_SHMEM);
	uffd = open_descriptor();
	if (uffd < 0)
		return uffd;
	if (ioctl(uffd, UFFDIO_API, &api)) {
		int error = errno;

		close(uffd);
		return -error;
	}
	return uffd;
}

int kh_uffd_register(int uffd, uint64_t address, uint64_t n_bytes, int modes)
{
	struct uffdio_register argument = {
		.range = { .start = address, .len = n_bytes },
		.mode = (modes & KH_UFFD_MISSING ? UFFDIO_REGISTER_MODE_MISSING : 0) |
			(modes & KH_UFFD_WP ? UFFDIO_REGISTER_MODE_WP : 0) |
			(modes & KH_UFFD_MINOR ? UFFDIO_REGISTER_MODE_MINOR : 0),
	};

	return ioctl(uffd, UFFDIO_REGISTER, &argument) ? -errno : 0;
}

int kh_uffd_unregister(int uffd, uint64_t address, uint64_t n_bytes)
{
	struct uffdio_range range = { .start = address, .len = n_bytes };

	if (ioctl(uffd, UFFDIO_UNREGISTER, &range))
		return -errno;
	/*
	 * The kernel wakes the waiters before it removes the registration: a fault
	 * that queues in between (it holds only the lock of its VMA) would keep
	 * sleeping.
	 */
	ioctl(uffd, UFFDIO_WAKE, &range);
	return 0;
}

/* EAGAIN: the address space changes concurrently (fork, munmap elsewhere). */
static int retry_ioctl(int uffd, unsigned long request, void *argument)
{
	while (ioctl(uffd, request, argument))
		if (errno != EAGAIN && errno != EINTR)
			return -errno;
	return 0;
}

int kh_uffd_write_protect(int uffd, uint64_t address, uint64_t n_bytes, int protect)
{
	struct uffdio_writeprotect argument = {
		.range = { .start = address, .len = n_bytes },
		.mode = protect ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
	};

	return retry_ioctl(uffd, UFFDIO_WRITEPROTECT, &argument);
}

int kh_uffd_copy(int uffd, uint64_t address, const void *page)
{
	struct uffdio_copy argument = {
		.dst = address,
		.src = (uintptr_t)page,
		.len = PAGE_BYTES,
		.mode = UFFDIO_COPY_MODE_DONTWAKE,
	};

	return retry_ioctl(uffd, UFFDIO_COPY, &argument);
}

int kh_uffd_copy_range(int uffd, uint64_t address, const void *pages, uint64_t n_bytes,
		       uint64_t *done)
{
	*done = 0;
	while (*done < n_bytes) {
		struct uffdio_copy argument = {
			.dst = address + *done,
			.src = (uintptr_t)pages + *done,
			.len = n_bytes - *done,
			.mode = UFFDIO_COPY_MODE_DONTWAKE,
		};
		int error = ioctl(uffd, UFFDIO_COPY, &argument) ? errno : 0;

		/*
		 * An error after some pages is reported as EAGAIN; the next call returns the error.
		 */
		if (argument.copy > 0)
			*done += argument.copy;
		else if (error != EAGAIN && error != EINTR)
			return -error;
	}
	return 0;
}

int kh_uffd_zero(int uffd, uint64_t address)
{
	struct uffdio_zeropage argument = { .range = { .start = address, .len = PAGE_BYTES },
					     .mode = UFFDIO_ZEROPAGE_MODE_DONTWAKE };

	return retry_ioctl(uffd, UFFDIO_ZEROPAGE, &argument);
}

int kh_uffd_continue(int uffd, uint64_t address)
{
	struct uffdio_continue argument = { .range = { .start = address, .len = PAGE_BYTES } };

	return retry_ioctl(uffd, UFFDIO_CONTINUE, &argument);
}

static int is_plain;

void kh_uffd_force_plain(int plain)
{
	__atomic_store_n(&is_plain, plain, __ATOMIC_RELAXED);
}

/* A page of a file that has none: a touch of it is behind the end of the file. */
static int map_nothing(int uffd, uint64_t address)
{
	int fd = memfd_create("lost", MFD_CLOEXEC), error = 0;

	if (fd < 0)
		return -errno;
	if (mmap((void *)address, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
		 0) == MAP_FAILED)
		error = -errno;
	close(fd);
	/* Waiters in the previous mapping are not woken automatically. */
	return error ? error : kh_uffd_wake(uffd, address);
}

int kh_uffd_poison(int uffd, uint64_t address)
{
	struct uffdio_poison argument = { .range = { .start = address, .len = PAGE_BYTES } };
	int result = -EINVAL;

	if (!__atomic_load_n(&is_plain, __ATOMIC_RELAXED))
		result = retry_ioctl(uffd, UFFDIO_POISON, &argument);
	/* Unknown to the kernel. */
	return result == -EINVAL || result == -ENOTTY ? map_nothing(uffd, address) : result;
}

int kh_uffd_wake(int uffd, uint64_t address)
{
	struct uffdio_range range = { .start = address, .len = PAGE_BYTES };

	return ioctl(uffd, UFFDIO_WAKE, &range) ? -errno : 0;
}
