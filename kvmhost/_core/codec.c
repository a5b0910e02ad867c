#include "codec_internal.h"

#include <sys/random.h>

typedef int (*lz4_compress_fn)(const char *source, char *target, int source_bytes,
			       int target_bytes, int acceleration);
typedef int (*lz4_decompress_fn)(const char *source, char *target, int source_bytes,
				 int target_bytes);
typedef size_t (*zstd_compress_fn)(void *context, void *target, size_t target_bytes,
				   const void *source, size_t source_bytes, int level);
typedef size_t (*zstd_decompress_fn)(void *context, void *target, size_t target_bytes,
				     const void *source, size_t source_bytes);
typedef void *(*zstd_new_fn)(void);
typedef size_t (*zstd_free_fn)(void *context);
typedef uint64_t (*checksum_fn)(const void *bytes, size_t n_bytes, uint64_t seed);

static int make_key(uint64_t *key)
{
	ssize_t got;

	do
		got = getrandom(key, sizeof(*key), 0);
	while (got < 0 && errno == EINTR);
	return got == sizeof(*key) ? 0 : got < 0 ? -errno : -EIO;
}

int kh_coder_init(struct kh_coder *coder, const struct kh_codec *codec)
{
	int result;

	coder->codec = *codec;
	coder->packer = coder->unpacker = NULL;
	pthread_mutex_init(&coder->unpack_lock, NULL);
	result = make_key(&coder->key);
	if (result || codec->kind != KH_CODEC_ZSTD)
		return result;
	coder->packer = ((zstd_new_fn)codec->new_packer)();
	coder->unpacker = ((zstd_new_fn)codec->new_unpacker)();
	return coder->packer && coder->unpacker ? 0 : -ENOMEM;
}

void kh_coder_destroy(struct kh_coder *coder)
{
	if (coder->packer)
		((zstd_free_fn)coder->codec.free_packer)(coder->packer);
	if (coder->unpacker)
		((zstd_free_fn)coder->codec.free_unpacker)(coder->unpacker);
	pthread_mutex_destroy(&coder->unpack_lock);
}

int kh_coder_pack(struct kh_coder *coder, const void *source, int n_bytes, void *target, int room)
{
	const struct kh_codec *codec = &coder->codec;
	size_t packed = 0;

	if (codec->kind == KH_CODEC_LZ4)
		return ((lz4_compress_fn)codec->compress)(source, target, n_bytes, room,
							  codec->level);
	if (codec->kind == KH_CODEC_ZSTD)
		packed = ((zstd_compress_fn)codec->compress)(coder->packer, target, room, source,
							     n_bytes, codec->level);
	/* zstd's error codes are above every size. */
	return packed <= (size_t)room ? packed : 0;
}

int kh_coder_unpack(struct kh_coder *coder, const void *source, int packed_bytes, void *target,
		    int n_bytes)
{
	const struct kh_codec *codec = &coder->codec;
	size_t unpacked = 0;

	if (codec->kind == KH_CODEC_LZ4) {
		unpacked = ((lz4_decompress_fn)codec->decompress)(source, target, packed_bytes,
								  n_bytes);
	} else if (codec->kind == KH_CODEC_ZSTD) {
		pthread_mutex_lock(&coder->unpack_lock);
		unpacked = ((zstd_decompress_fn)codec->decompress)(coder->unpacker, target, n_bytes,
								   source, packed_bytes);
		pthread_mutex_unlock(&coder->unpack_lock);
	}
	return unpacked == (size_t)n_bytes ? 0 : -EBADMSG;
}

/* Spreads every bit over all: splitmix64's last steps (Steele, Lea, Flood 2014). */
static uint64_t spread(uint64_t x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

uint64_t kh_coder_checksum(const struct kh_coder *coder, const void *bytes, uint64_t n_bytes,
			   uint64_t page, uint64_t batch)
{
	checksum_fn checksum = (checksum_fn)coder->codec.checksum;

	if (!checksum)
		return 0;
	return checksum(bytes, n_bytes, spread(spread(coder->key ^ page) ^ batch));
}
