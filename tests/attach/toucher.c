/*
 * A program that knows nothing of kvmhost: it maps a memfd and touches pages of it
 * as standard input tells, one answer a line.
 *
 *   toucher PAGES [private]     prints the mapping's address
 *   r FIRST STEP COUNT          read one byte of each such page
 *   w FIRST STEP COUNT          write one
 *   p                           track writes: an asynchronous userfaultfd of its own
 *   l                           lock the first 8 pages
 *   u                           unmap; x: run another program; q: end
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Newer than some installed headers: Linux v6.7 and v6.4. */
#define WP_ASYNC (1 << 15)
#define WP_UNPOPULATED (1 << 13)

static int track_writes(void *memory, size_t length)
{
	struct uffdio_api api = { .api = UFFD_API,
				  .features = UFFD_FEATURE_WP_HUGETLBFS_SHMEM | WP_ASYNC |
					      WP_UNPOPULATED };
	struct uffdio_register range = { .range = { (unsigned long)memory, length },
					 .mode = UFFDIO_REGISTER_MODE_WP };
	struct uffdio_writeprotect protect = { .range = { (unsigned long)memory, length },
					       .mode = UFFDIO_WRITEPROTECT_MODE_WP };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	return fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &range) ||
	       ioctl(fd, UFFDIO_WRITEPROTECT, &protect);
}

static void touch(volatile char *memory, char how, size_t first, size_t step, size_t count)
{
	for (size_t page = first; count; count--, page += step) {
		if (how == 'w')
			memory[page * 4096] = 1;
		else
			(void)memory[page * 4096];
	}
}

int main(int argc, char **argv)
{
	size_t pages = strtoul(argv[1], NULL, 0), first, step, count;
	int flags = argc > 2 ? MAP_PRIVATE : MAP_SHARED, fd = memfd_create("guest-ram", 0);
	char line[128], *memory;

	if (fd < 0 || ftruncate(fd, pages * 4096))
		return 1;
	memory = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (memory == MAP_FAILED)
		return 1;
	printf("%p\n", (void *)memory);
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		int failed = 0;

		if (sscanf(line + 1, "%zu %zu %zu", &first, &step, &count) == 3)
			touch(memory, line[0], first, step, count);
		else if (line[0] == 'p')
			failed = track_writes(memory, pages * 4096);
		else if (line[0] == 'l')
			failed = mlock(memory, 8 * 4096);
		else if (line[0] == 'u')
			failed = munmap(memory, pages * 4096);
		else if (line[0] == 'x')
			execl("/bin/cat", "cat", (char *)NULL);
		else
			return 0;
		puts(failed ? "failed" : "done");
		fflush(stdout);
	}
	return 0;
}
