/*
 * Secondary MMU: tables in table memory, walkers over them, the harvest.
 *
 * Physical addresses ("pa") are what table entries hold; a table memory maps
 * them to host bytes. A gfn counts base pages of the table (4 KiB, or 64 KiB
 * for a radix table of that base). Ranges are [start, end). Every function
 * returns a non-negative result or -errno.
 */
#ifndef KVMHOST_MMU_CORE_H
#define KVMHOST_MMU_CORE_H

#include "compat.h"

#define KH_FMT_NPT 0
#define KH_FMT_EPT 1
#define KH_FMT_STAGE2 2
#define KH_FMT_RADIX 3

/* kh_mmu_config.flags */
#define KH_MMU_POISON 1    /* fill freed table pages with KH_POISON */
#define KH_MMU_SW_ACCESS 2 /* the fault handler sets accessed bits, not hardware */
#define KH_MMU_RANGE_RETRY 8 /* a fault retries for invalidations of its gfn only */
#define KH_MMU_PLAIN_RETRY 16 /* ... for every invalidation. Neither: as the format's KVM */
#define KH_MMU_KVM 4       /* live tables of a KVM: its own bit for "present", see kh_mmu_open_live */

#define KH_POISON 0xdeadbeefdeadffffull

/* Why a walk did not follow an entry, or did not take it for a leaf. */
#define KH_BAD_OUTSIDE 1 /* points outside the table memory */
#define KH_BAD_LOOP 2    /* points to a table that the walk came through */
#define KH_BAD_LEAF 3    /* a leaf at a level that has none */
#define KH_BAD_WIDTH 4   /* radix: another index width than the next level has */

/* kh_mmu_harvest flags */
#define KH_HARVEST_CLEAR 1  /* clear the pages in the mask (all without a mask) */
#define KH_HARVEST_DIRTY 2  /* dirty state instead of the accessed bit */
#define KH_HARVEST_LOCKED 4 /* hold the MMU lock for write, as before 2023 (for comparison) */

/* The geometry of a table. Zero selects the default of the format. */
struct kh_mmu_config {
	uint32_t format;      /* KH_FMT_* */
	uint32_t levels;      /* tdp: 4 or 5 */
	uint32_t ipa_bits;    /* stage 2: 32 to 48, to 52 for live tables */
	uint32_t page_shift;  /* radix: 12 or 16 */
	uint32_t flags;       /* KH_MMU_* */
	uint32_t n_as;        /* address spaces (1) */
	uint64_t arena_pa;    /* made-up physical address of the arena */
	uint64_t arena_bytes; /* size of the arena; untouched parts use no memory */
};

/* The shape that a configuration gives. Levels count from 1, the base page. */
struct kh_mmu_shape {
	uint32_t n_levels;
	uint32_t page_shift;
	uint32_t shift[6]; /* log2 of the bytes that an entry of that level maps */
	uint32_t bits[6];  /* log2 of the entries in a table of that level */
	uint64_t n_gfns;   /* size of the address space, in base pages */
};

/* Host bytes that back [pa_start, pa_start + n_bytes). */
struct kh_region {
	uint64_t pa_start;
	uint64_t host_address;
	uint64_t n_bytes;
};

/* Part of a harvest: n_pages from gfn_start, reported from bit `bit` on. */
struct kh_segment {
	uint64_t gfn_start;
	uint64_t n_pages;
	uint64_t bit;
	uint32_t as_id;
	uint32_t reserved;
};

/* Counters of a walk. They are added to, never reset. */
struct kh_walk_stats {
	uint64_t tables;       /* last-level tables read */
	uint64_t huge_leaves;  /* leaves above the last level */
	uint64_t young;        /* leaves found young (dirty) */
	uint64_t cleared;      /* bits cleared by this walk */
	uint64_t lost;         /* young when read, changed by another thread before the clear */
	uint64_t bad_pointers; /* entries that point outside the table memory; skipped */
	uint64_t poisoned;     /* entries read from a freed table page: always 0 */
	uint64_t yields;       /* times the walk left its epoch and re-entered */
};

/* The first entry of a walk that was refused. */
struct kh_bad_entry {
	uint64_t gfn;    /* where the walk was */
	uint64_t entry;  /* its value, in CPU order */
	uint32_t level;
	uint32_t reason; /* KH_BAD_*; 0: none was refused */
};

struct kh_mmu;

int kh_mmu_shape(const struct kh_mmu_config *config, struct kh_mmu_shape *shape);
/*
 * Walk tables that this layer does not own, from the root at root_pa. With KH_MMU_KVM
 * they are those that a KVM has built and goes on changing: bits are cleared by
 * compare-and-swap only, and a harvest checks the tables above the last level before it
 * clears anything.
 */
int kh_mmu_open_live(struct kh_mmu **mmu, const struct kh_mmu_config *config,
		     const struct kh_region *regions, uint32_t n_regions, uint64_t root_pa);
void kh_mmu_close(struct kh_mmu *mmu);
/* Test, or test and clear, the accessed (dirty) state of some gfns, without a lock. */
int kh_mmu_harvest(struct kh_mmu *mmu, const struct kh_segment *segments, uint32_t n_segments,
		   uint32_t flags, const uint64_t *mask, uint64_t *young, uint64_t *coarse,
		   struct kh_walk_stats *stats);
/*
 * The same for tables of KH_MMU_KVM: -EUCLEAN if an entry is refused, with that entry.
 * If stats->cleared is 0 then, nothing was changed.
 */
int kh_mmu_harvest_checked(struct kh_mmu *mmu, const struct kh_segment *segments,
			   uint32_t n_segments, uint32_t flags, const uint64_t *mask,
			   uint64_t *young, uint64_t *coarse, struct kh_walk_stats *stats,
			   struct kh_bad_entry *bad);
/* Host bytes of a table entry for a gfn at a level: the raw entry, or -ENOENT. */
int kh_mmu_read_entry(struct kh_mmu *mmu, uint32_t as_id, uint64_t gfn, uint32_t level,
		      uint64_t *raw);
/* 0 scalar, 1 AVX2: the instruction set of the scan; `force` 0 or 1 selects it, -1 only queries. */
int kh_scan_level(int force);

#endif
