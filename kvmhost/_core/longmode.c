#include "longmode.h"

/* Intel SDM vol. 3A, 4.5 ("4-level paging"), and the same bits in AMD64. */
#define PTE_PRESENT 0x1ull
#define PTE_WRITE 0x2ull
#define PTE_USER 0x4ull
#define PTE_HUGE 0x80ull
#define PTE_FLAGS (PTE_PRESENT | PTE_WRITE | PTE_USER)
#define PTE_ADDRESS 0x000ffffffffff000ull
#define PAGE_BYTES 4096ull
#define HUGE_BYTES (512 * PAGE_BYTES)
#define ROOT_LEVEL 4

static uint64_t *table_at(struct kh_tables *tables, uint64_t pa)
{
	return (uint64_t *)(uintptr_t)(tables->alias + (pa - tables->pa));
}

/* The table of a level that maps address, created if needed; NULL if there is no room left. */
static uint64_t *table_of(struct kh_tables *tables, uint64_t address, int lowest)
{
	uint64_t *table = table_at(tables, tables->pa);

	if (!tables->used_pages)
		tables->used_pages = 1;
	for (int level = ROOT_LEVEL; level > lowest; level--) {
		uint64_t *entry = &table[address >> (12 + 9 * (level - 1)) & 511];

		if (!(*entry & PTE_PRESENT)) {
			if (tables->used_pages == tables->n_pages)
				return NULL;
			*entry = (tables->pa + PAGE_BYTES * tables->used_pages++) | PTE_FLAGS;
		}
		table = table_at(tables, *entry & PTE_ADDRESS);
	}
	return table;
}

int kh_tables_identity_huge(struct kh_tables *tables, uint64_t start, uint64_t n_bytes)
{
	for (uint64_t address = start; address < start + n_bytes; address += HUGE_BYTES) {
		uint64_t *table = table_of(tables, address, 2);

		if (!table)
			return -ENOSPC;
		table[address / HUGE_BYTES % 512] = address | PTE_FLAGS | PTE_HUGE;
	}
	return 0;
}

int kh_tables_identity(struct kh_tables *tables, uint64_t start, uint64_t n_pages)
{
	uint64_t *table = NULL;

	for (uint64_t page = 0; page < n_pages; page++) {
		uint64_t address = start + page * PAGE_BYTES, index = address / PAGE_BYTES % 512;

		if (!table || !index)
			table = table_of(tables, address, 1);
		if (!table)
			return -ENOSPC;
		table[index] = address | PTE_FLAGS;
	}
	return 0;
}
