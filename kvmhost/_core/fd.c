#include "fd.h"

#include <fcntl.h>

int kh_ioctl_int(int fd, unsigned long request, unsigned long argument)
{
	int result = ioctl(fd, request, argument);

	return result < 0 ? -errno : result;
}

int kh_ioctl_ptr(int fd, unsigned long request, void *argument)
{
	int result = ioctl(fd, request, argument);

	return result < 0 ? -errno : result;
}

int kh_punch(int fd, uint64_t offset, uint64_t n_bytes)
{
	int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

	return fallocate(fd, mode, offset, n_bytes) ? -errno : 0;
}
