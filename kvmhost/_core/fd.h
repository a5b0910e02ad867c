/*
 * System calls on descriptors, with errno kept: every function returns
 * a non-negative result or -errno.
 */
#ifndef KVMHOST_FD_H
#define KVMHOST_FD_H

#include "compat.h"

/* ioctl(2) with an integer argument. */
int kh_ioctl_int(int fd, unsigned long request, unsigned long argument);
/* ioctl(2) with a pointer argument. */
int kh_ioctl_ptr(int fd, unsigned long request, void *argument);

#endif
