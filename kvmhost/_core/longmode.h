/*
 * Page tables that the VMM lays out in guest memory for its 64-bit guests:
 * the long-mode layout, 4 KiB leaves, virtual address = guest physical address.
 */
#ifndef KVMHOST_LONGMODE_H
#define KVMHOST_LONGMODE_H

#include "compat.h"

/* Tables under construction: a run of guest memory, seen through the alias. */
struct kh_tables {
	uint64_t alias;		/* host address of pa */
	uint64_t pa;		/* guest physical address of the root */
	uint64_t n_pages;	/* room */
	uint64_t used_pages;
};

/*
 * Map [start, start + n_pages * 4096) onto itself: present, writable, user,
 * accessed and dirty clear. -ENOSPC if the tables' room is too small.
 */
int kh_tables_identity(struct kh_tables *tables, uint64_t start, uint64_t n_pages);
/* The same with leaves of 2 MiB; both are multiples of that. */
int kh_tables_identity_huge(struct kh_tables *tables, uint64_t start, uint64_t n_bytes);

#endif
