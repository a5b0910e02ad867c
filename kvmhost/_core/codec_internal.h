/* A codec with the contexts that it works in. */
#ifndef KVMHOST_CODEC_INTERNAL_H
#define KVMHOST_CODEC_INTERNAL_H

#include "codec.h"

#include <pthread.h>

struct kh_coder {
	struct kh_codec codec;
	void *packer;		/* one packs at a time: the evictor */
	void *unpacker;
	pthread_mutex_t unpack_lock;
};

int kh_coder_init(struct kh_coder *coder, const struct kh_codec *codec);
void kh_coder_destroy(struct kh_coder *coder);
/* Pack into at most room bytes; the bytes, or 0 if they do not suffice. */
int kh_coder_pack(struct kh_coder *coder, const void *source, int n_bytes, void *target, int room);
/* Unpack to exactly n_bytes; 0 or -EBADMSG. */
int kh_coder_unpack(struct kh_coder *coder, const void *source, int packed_bytes, void *target,
		    int n_bytes);
/* Of bytes that belong to one page: the same bytes under another seed do not pass. */
uint64_t kh_coder_checksum(const struct kh_coder *coder, const void *bytes, uint64_t n_bytes,
			   uint64_t seed);

#endif
