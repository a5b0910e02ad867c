"""Compression for the store: the C functions of the lz4 package, called from C.

The fault path runs without the interpreter, so it needs compression as plain C
functions. The ``lz4`` package carries them inside its extension module, with
default visibility; they are looked up there by name. Where a build of the
package hides them, pages are kept uncompressed, and ``kvmhost doctor`` says so.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from typing import Any

from kvmhost._ffi import ffi

__all__ = ["Codec", "lz4_codec"]


@dataclasses.dataclass(frozen=True)
class Codec:
    """A pair of C functions; ``ffi.NULL`` for both keeps pages as they are."""

    name: str
    compress: Any
    decompress: Any


@functools.cache
def lz4_codec() -> Codec:
    """Return lz4's block functions, or the codec ``none`` if they cannot be had."""
    try:
        import lz4.block

        # SAFETY: the extension stays loaded as long as the module is imported.
        library = ctypes.CDLL(lz4.block._block.__file__)
        compress = ctypes.cast(library.LZ4_compress_fast, ctypes.c_void_p).value
        decompress = ctypes.cast(library.LZ4_decompress_safe, ctypes.c_void_p).value
    except (ImportError, AttributeError, OSError):
        return Codec("none", ffi.NULL, ffi.NULL)
    return Codec(
        "lz4",
        ffi.cast("kh_compress_fn", compress),
        ffi.cast("kh_decompress_fn", decompress),
    )
