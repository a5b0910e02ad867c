/* A codec with the contexts that it works in. */
#ifndef KVMHOST_CODEC_INTERNAL_H
#define KVMHOST_CODEC_INTERNAL_H

#include "codec.h"

#include <pthread.h>

struct kh_coder {
	struct kh_codec codec;
	void *packer;		/* only the evictor compresses, one page at a time */
	void *unpacker;
	pthread_mutex_t unpack_lock;
	uint64_t key;		/* key of the checksums: random, never written to a file */
};

/* 0, -ENOMEM, or what getrandom(2) failed with. */
int kh_coder_init(struct kh_coder *coder, const struct kh_codec *codec);
void kh_coder_destroy(struct kh_coder *coder);
/* Compress into at most room bytes; returns the size, or 0 if room is too small. */
int kh_coder_pack(struct kh_coder *coder, const void *source, int n_bytes, void *target, int room);
/* Decompress to exactly n_bytes; returns 0 or -EBADMSG. */
int kh_coder_unpack(struct kh_coder *coder, const void *source, int packed_bytes, void *target,
		    int n_bytes);
/*
 * Of bytes that belong to one page, from one batch: the same bytes as another page,
 * of another batch or from another coder do not pass. A valid checksum cannot be
 * computed without the key.
 */
uint64_t kh_coder_checksum(const struct kh_coder *coder, const void *bytes, uint64_t n_bytes,
			   uint64_t page, uint64_t batch);

#endif
