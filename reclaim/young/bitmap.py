"""The young bitmap, as the rest of reclaim imports it."""

from kvmhost.bitmap import Provenance, Words, YoungBitmap, n_words, pack, unpack

__all__ = ["Provenance", "Words", "YoungBitmap", "n_words", "pack", "unpack"]
