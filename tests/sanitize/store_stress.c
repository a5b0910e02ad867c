/*
 * Threads that put, get and drop pages of their own in one store, in all sizes
 * and no order, while another thread empties sparse chunks; what comes back is
 * compared with what went. Locks are as in the pager. Usage: memory|file
 * SECONDS. Built with a sanitizer by the Makefile here.
 */
#include "store_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define THREADS 4
#define PAGES_EACH 200

static struct kh_store store;
static int stop;
static pthread_mutex_t writing = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t pages[THREADS * PAGES_EACH];

struct worker {
	pthread_t thread;
	uint64_t first, random, turns;
};

static uint64_t next(uint64_t *random)
{
	*random = *random * 6364136223846793005ull + 1442695040888963407ull;
	return *random >> 33;
}

/* Stands in for a library: the bytes up to the last that is not zero. */
static int pack(const char *source, char *target, int n_bytes, int room, int level)
{
	(void)level;
	while (n_bytes && !source[n_bytes - 1])
		n_bytes--;
	if (n_bytes > room || !n_bytes)
		return 0;
	memcpy(target, source, n_bytes);
	return n_bytes;
}

static int unpack(const char *source, char *target, int packed, int n_bytes)
{
	memcpy(target, source, packed);
	memset(target + packed, 0, n_bytes - packed);
	return n_bytes;
}

static uint64_t checksum(const void *bytes, size_t n_bytes, uint64_t seed)
{
	const unsigned char *byte = bytes;

	for (size_t i = 0; i < n_bytes; i++)
		seed = (seed ^ byte[i]) * 0x100000001b3ull;
	return seed;
}

/* A page that its index and version determine; the first byte is never 0. */
static void make_page(char *page, uint64_t index, uint64_t version)
{
	uint64_t random = index * 77 + version, length = 1 + next(&random) % KH_PAGE_BYTES;

	memset(page, 0, KH_PAGE_BYTES);
	if (version % 8 == 0)
		return;
	for (uint64_t i = 0; i < length; i++)
		page[i] = 1 + next(&random) % 255;
}

static void fail(const char *what, uint64_t index)
{
	fprintf(stderr, "%s: page %llu\n", what, (unsigned long long)index);
	exit(1);
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	uint64_t versions[PAGES_EACH] = { 0 };
	char page[KH_PAGE_BYTES], found[KH_PAGE_BYTES];

	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
		uint64_t i = next(&worker->random) % PAGES_EACH, index = worker->first + i;

		worker->turns++;
		if (!versions[i]) {
			versions[i] = worker->turns;
			make_page(page, index, versions[i]);
			pthread_mutex_lock(&writing);
			pthread_mutex_lock(&pages[index]);
			if (kh_store_put(&store, index, page, 1) != KH_EVICT_DONE)
				fail("not stored", index);
			pthread_mutex_unlock(&pages[index]);
			pthread_mutex_unlock(&writing);
			continue;
		}
		make_page(page, index, versions[i]);
		pthread_mutex_lock(&pages[index]);
		if (kh_store_get(&store, index, found) || memcmp(page, found, KH_PAGE_BYTES))
			fail("not what went", index);
		kh_store_drop(&store, index);
		versions[i] = 0;
		if (kh_store_get(&store, index, found) != -ENOENT)
			fail("still there", index);
		pthread_mutex_unlock(&pages[index]);
	}
	for (uint64_t i = 0; i < PAGES_EACH; i++)
		if (versions[i]) {
			pthread_mutex_lock(&pages[worker->first + i]);
			kh_store_drop(&store, worker->first + i);
			pthread_mutex_unlock(&pages[worker->first + i]);
		}
	return NULL;
}

/* A pass after the other, whether one is due or not. */
static void *tidy(void *argument)
{
	uint64_t *moves = argument;

	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
		int64_t slot, index;

		pthread_mutex_lock(&writing);
		pthread_mutex_lock(&store.slab.lock);
		store.slab.pass_mark = UINT64_MAX;
		store.slab.limit_bytes = store.slab.chunk_bytes;
		pthread_mutex_unlock(&store.slab.lock);
		for (int i = 0; i < 20 && kh_slab_is_sparse(&store.slab); i++) {
			slot = kh_slab_next_move(&store.slab);
			index = slot < 0 ? -1 : kh_store_owner(&store, slot);
			if (index < 0 || index >= THREADS * PAGES_EACH)
				continue;
			pthread_mutex_lock(&pages[index]);
			*moves += kh_store_move(&store, index, slot);
			pthread_mutex_unlock(&pages[index]);
		}
		__atomic_store_n(&store.slab.limit_bytes, 0, __ATOMIC_RELAXED);
		pthread_mutex_unlock(&writing);
		usleep(50);
	}
	return NULL;
}

int main(int n_words, char **words)
{
	struct kh_codec codec = { .kind = KH_CODEC_LZ4, .level = 1, .compress = (void *)pack,
				  .decompress = (void *)unpack, .checksum = (void *)checksum };
	struct worker workers[THREADS] = { 0 };
	uint64_t turns = 0, moves = 0;
	pthread_t tidying;
	FILE *file = NULL;

	if (n_words != 3)
		return 2;
	if (!strcmp(words[1], "file"))
		file = tmpfile();
	if (kh_store_init(&store, THREADS * PAGES_EACH, &codec, file ? fileno(file) : -1))
		return 1;
	for (int i = 0; i < THREADS * PAGES_EACH; i++)
		pthread_mutex_init(&pages[i], NULL);
	for (int i = 0; i < THREADS; i++) {
		workers[i].first = i * PAGES_EACH;
		workers[i].random = i + 1;
		pthread_create(&workers[i].thread, NULL, work, &workers[i]);
	}
	pthread_create(&tidying, NULL, tidy, &moves);
	usleep(atof(words[2]) * 1e6);
	__atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
	for (int i = 0; i < THREADS; i++) {
		pthread_join(workers[i].thread, NULL);
		turns += workers[i].turns;
	}
	pthread_join(tidying, NULL);
	if (store.used_bytes || store.slab.slot_bytes || store.slab.chunk_bytes || store.same_filled_pages || store.raw_pages)
		fail("left over", 0);
	kh_store_destroy(&store);
	if (file)
		fclose(file);
	printf("store in %s: %llu turns, %llu moves, no error\n", words[1],
	       (unsigned long long)turns, (unsigned long long)moves);
	return turns && moves ? 0 : 1;
}
