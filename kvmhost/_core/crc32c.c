/* CRC-32C: eight bytes at a time by tables, or by the processor's instruction. */
#include "chunk.h"

#include <pthread.h>
#include <string.h>

#define POLYNOMIAL 0x82f63b78u	/* reflected */

static uint32_t table[8][256];
static pthread_once_t made = PTHREAD_ONCE_INIT;

static void make_tables(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t crc = i;

		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
		table[0][i] = crc;
	}
	for (int k = 1; k < 8; k++)
		for (uint32_t i = 0; i < 256; i++)
			table[k][i] = table[k - 1][i] >> 8 ^ table[0][table[k - 1][i] & 0xff];
}

static uint32_t by_bytes(uint32_t crc, const unsigned char *p, uint64_t n)
{
	while (n--)
		crc = crc >> 8 ^ table[0][(crc ^ *p++) & 0xff];
	return crc;
}

static uint32_t by_tables(uint32_t crc, const unsigned char *p, uint64_t n)
{
	for (; n >= 8; p += 8, n -= 8) {
		uint32_t low = crc ^ (p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24);

		crc = table[7][low & 0xff] ^ table[6][low >> 8 & 0xff] ^
		      table[5][low >> 16 & 0xff] ^ table[4][low >> 24] ^ table[3][p[4]] ^
		      table[2][p[5]] ^ table[1][p[6]] ^ table[0][p[7]];
	}
	return by_bytes(crc, p, n);
}

#ifdef __x86_64__
__attribute__((target("sse4.2"))) static uint32_t
by_instruction(uint32_t crc, const unsigned char *p, uint64_t n)
{
	uint64_t wide = crc;

	for (; n >= 8; p += 8, n -= 8) {
		uint64_t word;

		memcpy(&word, p, sizeof(word));
		wide = __builtin_ia32_crc32di(wide, word);
	}
	return by_bytes(wide, p, n);
}
#endif

uint32_t kh_crc32c(const void *data, uint64_t n_bytes)
{
	pthread_once(&made, make_tables);
#ifdef __x86_64__
	if (__builtin_cpu_supports("sse4.2"))
		return ~by_instruction(~0u, data, n_bytes);
#endif
	return ~by_tables(~0u, data, n_bytes);
}

uint32_t kh_crc32c_by_tables(const void *data, uint64_t n_bytes)
{
	pthread_once(&made, make_tables);
	return ~by_tables(~0u, data, n_bytes);
}
