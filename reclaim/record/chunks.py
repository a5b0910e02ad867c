"""Chunk files: numpy arrays as zstd frames, with bounds that do not depend on the file.

A frame holds the plain bytes of an array, in C order. Chunks of records of format 1 also
have Zarr's filters: ``packbits`` (a byte of padding bits before the bits) and ``shuffle``.

A chunk is written to a temporary file and renamed, so a reader never sees a partial
chunk. A zstd frame contains the size and checksum of its content: the size must match
the metadata before decompression, and both are verified afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmhost import files
from kvmhost.bitmap import Words
from kvmhost.errors import CapabilityError
from kvmhost.installing import install_hint
from kvmhost.reclaim.errors import RecordError

__all__ = [
    "TEMPORARY",
    "decode_array",
    "decode_bits",
    "encode_array",
    "encode_bits",
    "need_zstd",
    "read_file",
    "unzstd",
    "write_file",
    "zstd",
]

#: Prefix of temporary files.
TEMPORARY = files.TEMPORARY


def need_zstd() -> Any:
    """Return the zstandard module.

    :raises CapabilityError: without it
    """
    try:
        import zstandard
    except ImportError as error:
        raise CapabilityError(
            "record",
            "zstandard",
            str(error),
            install_hint("record"),
        ) from error
    return zstandard


def zstd(raw: bytes, level: int = 3) -> bytes:
    """Return a zstd frame with content size and checksum."""
    compressor = need_zstd().ZstdCompressor(level=level, write_checksum=True)
    packed: bytes = compressor.compress(raw)
    return packed


def unzstd(packed: bytes, n_bytes: int, path: Path, field: str, offset: int = 0) -> bytes:
    """Decompress a frame that must contain ``n_bytes``.

    :raises RecordError: if it is damaged, or gives another size
    """
    zstandard = need_zstd()
    try:
        said = zstandard.get_frame_parameters(packed)
        if said.content_size != n_bytes:
            problem = f"the frame gives a content size of {said.content_size} bytes, need {n_bytes}"
            raise RecordError(str(path), field, problem, offset)
        if not said.has_checksum:
            raise RecordError(str(path), field, "the frame has no checksum", offset)
        raw: bytes = zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        problem = f"{len(packed)} bytes are not a complete zstd frame: {error}"
        raise RecordError(str(path), field, problem, offset) from None
    return raw


def encode_bits(history: Words) -> bytes:
    """Return a chunk of a bit array: eight bytes for each page, its first window first."""
    return zstd(history.astype(">u8").tobytes())


def decode_bits(packed: bytes, n_pages: int, path: Path, *, filtered: bool = False) -> Words:
    """Return one word per page: the inverse of :func:`encode_bits`.

    :param filtered: of a record of format 1
    :raises RecordError: if the chunk is damaged
    """
    raw = unzstd(packed, filtered + 8 * n_pages, path, "chunk")
    if filtered and raw[0]:
        raise RecordError(str(path), "padding", f"{raw[0]} bits, need 0", 0)
    return np.frombuffer(raw, dtype=">u8", offset=int(filtered)).astype(np.uint64)


def encode_array(values: npt.NDArray[Any], dtype: str) -> bytes:
    """Return a chunk of numbers."""
    return zstd(np.ascontiguousarray(values, dtype=dtype).tobytes())


def decode_array(
    packed: bytes, shape: tuple[int, ...], dtype: str, path: Path, *, filtered: bool = False
) -> Any:
    """Return an array: the inverse of :func:`encode_array`.

    :param filtered: of a record of format 1
    :raises RecordError: if the chunk is damaged
    """
    size = np.dtype(dtype).itemsize
    n_bytes = int(np.prod(shape)) * size
    plain = np.frombuffer(unzstd(packed, n_bytes, path, "chunk"), dtype=np.uint8)
    if filtered:
        plain = np.ascontiguousarray(plain.reshape(size, -1).T).reshape(-1)
    return plain.view(dtype).reshape(shape)


def read_file(path: Path, most_bytes: int) -> bytes | None:
    """Return a file's bytes; None if there is no such file.

    :raises RecordError: if it is too large, is not a file, or cannot be read
    """
    try:
        return files.read_regular(path, most_bytes)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordError(str(path), "file", error.strerror or str(error)) from error


def write_file(path: Path, raw: bytes) -> None:
    """Replace a file of a record atomically, without following a symbolic link.

    :raises HostError: if it cannot be written; an existing file is kept
    """
    files.write_file(path, raw, sync=False, follow_last=False)
