"""Compression and checksums for the store: C functions of packages, called from C.

The fault path runs without the interpreter, so it needs plain C functions. The
packages ``lz4``, ``zstandard`` and ``xxhash`` carry them inside their extension
modules, with default visibility; they are looked up there by name, and in the
system's library where a build of a package hides them. A codec without
them is refused by name; ``kvmhost doctor`` reports it too.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
from typing import Any

from kvmhost._ffi import ffi, lib
from kvmhost.errors import CapabilityError
from kvmhost.vm.names import CODECS

__all__ = ["Codec", "find_codec", "has_checksum"]

#: Codec: module of the package, library of the system, functions, level.
_SOURCES: dict[str, tuple[str, str, dict[str, str], int]] = {
    "lz4": (
        "lz4.block._block",
        "liblz4.so.1",
        {"compress": "LZ4_compress_fast", "decompress": "LZ4_decompress_safe"},
        1,
    ),
    "zstd": (
        "zstandard._cffi",
        "libzstd.so.1",
        {
            "compress": "ZSTD_compressCCtx",
            "decompress": "ZSTD_decompressDCtx",
            "new_packer": "ZSTD_createCCtx",
            "free_packer": "ZSTD_freeCCtx",
            "new_unpacker": "ZSTD_createDCtx",
            "free_unpacker": "ZSTD_freeDCtx",
        },
        1,
    ),
}


@dataclasses.dataclass(frozen=True)
class Codec:
    """A codec in the form that the C pager takes.

    :ivar core: ``struct kh_codec *``
    :ivar checked: whether pages carry a checksum
    """

    name: str
    core: Any
    checked: bool


@functools.cache
def find_codec(name: str, checked: bool = True) -> Codec:
    """Return a codec by name, with checksums if they are available.

    :raises CapabilityError: if its functions cannot be found
    """
    if name == "auto":
        return _first_of(CODECS[1:], checked)
    core = ffi.new("struct kh_codec *")
    core.kind = {"none": lib.KH_CODEC_NONE, "lz4": lib.KH_CODEC_LZ4, "zstd": lib.KH_CODEC_ZSTD}[
        name
    ]
    if name in _SOURCES:
        module, library, functions, core.level = _SOURCES[name]
        for field, address in _addresses(module, library, tuple(functions.values())).items():
            part = next(part for part, function in functions.items() if function == field)
            setattr(core, part, ffi.cast("void *", address))
    if checked and has_checksum():
        found = _addresses("xxhash._xxhash", "libxxhash.so.0", ("XXH3_64bits_withSeed",))
        core.checksum = ffi.cast("void *", found["XXH3_64bits_withSeed"])
    return Codec(name, core, core.checksum != ffi.NULL)


@functools.cache
def has_checksum() -> bool:
    """Whether a checksum function is available."""
    try:
        _addresses("xxhash._xxhash", "libxxhash.so.0", ("XXH3_64bits_withSeed",))
    except CapabilityError:
        return False
    return True


def _first_of(names: tuple[str, ...], checked: bool) -> Codec:
    for name in names[:-1]:
        try:
            return find_codec(name, checked)
        except CapabilityError:
            continue
    return find_codec(names[-1], checked)


def _addresses(module: str, library: str, functions: tuple[str, ...]) -> dict[str, int]:
    found = f"neither {module} nor {library} has them"
    for path in (_module_file(module), library):
        try:
            # SAFETY: never closed, so the function pointers stay valid.
            handle = ctypes.CDLL(path or "")
            pointers = {n: ctypes.cast(handle[n], ctypes.c_void_p).value or 0 for n in functions}
        except (AttributeError, OSError):
            continue
        if path and all(pointers.values()):
            return pointers
    package = module.partition(".")[0]
    raise CapabilityError(
        f"codec functions of {package}",
        ", ".join(functions),
        found,
        f"install the package {package} from PyPI as a wheel",
    )


def _module_file(module: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        return None
    return spec.origin if spec is not None else None
