/*
 * Compression and checksums for the store: functions of libraries that Python
 * has found by name, called from C because the fault path runs without the
 * interpreter.
 */
#ifndef KVMHOST_CODEC_H
#define KVMHOST_CODEC_H

#include "compat.h"

#define KH_CODEC_NONE 0		/* pages are kept as they are */
#define KH_CODEC_LZ4 1
#define KH_CODEC_ZSTD 2

struct kh_codec {
	int kind;		/* KH_CODEC_* */
	int level;		/* lz4: acceleration; zstd: level */
	void *compress;		/* LZ4_compress_fast or ZSTD_compressCCtx */
	void *decompress;	/* LZ4_decompress_safe or ZSTD_decompressDCtx */
	void *new_packer;	/* zstd only: ZSTD_createCCtx, ZSTD_freeCCtx, and for D */
	void *free_packer;
	void *new_unpacker;
	void *free_unpacker;
	void *checksum;		/* XXH3_64bits_withSeed; NULL: nothing is checked */
};

#endif
