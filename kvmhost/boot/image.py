"""Guest images: 64-bit x86 ELF executables that describe their own parameters.

An image may carry a section ``.kvmhost.params``: one NUL-terminated line a
parameter, ``name=default;what it means``. Line ``i`` names argument ``i`` of the
parameter page (see :mod:`kvmhost.boot.params`).

A file is untrusted: whatever is wrong with it ends in an
:class:`~kvmhost.errors.ImageError` that names file, field and offset.
"""

from __future__ import annotations

import dataclasses
import stat
import struct
from pathlib import Path

from kvmhost.errors import ImageError, LayoutError
from kvmhost.memory.guest import GuestMemory
from kvmhost.memory.layout import IMAGE_GPA

__all__ = ["MAX_IMAGE_BYTES", "Image", "Param", "Segment", "read_image"]

MAX_IMAGE_BYTES = 256 << 20
PARAMS_SECTION = ".kvmhost.params"
MAX_PARAMS = 64

_EM_X86_64 = 62
_ET_EXEC = 2


@dataclasses.dataclass(frozen=True)
class Param:
    """One named argument of a guest; values are unsigned 64-bit numbers."""

    name: str
    default: int
    help: str


@dataclasses.dataclass(frozen=True)
class Segment:
    """Bytes to load at a gpa; ``mem_bytes`` beyond the data are zero."""

    gpa: int
    data: bytes
    mem_bytes: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Image:
    """A parsed image."""

    path: str
    entry: int
    segments: tuple[Segment, ...]
    params: tuple[Param, ...]

    @property
    def end(self) -> int:
        """First gpa after the loaded image."""
        return max(segment.gpa + segment.mem_bytes for segment in self.segments)

    def load(self, memory: GuestMemory, limit_gpa: int) -> None:
        """Copy the segments into guest memory.

        :param limit_gpa: where the image must end at the latest
        :raises ImageError: if a segment does not fit
        """
        for segment in self.segments:
            end = segment.gpa + segment.mem_bytes
            if segment.gpa < IMAGE_GPA or end > limit_gpa:
                raise ImageError(
                    self.path,
                    "p_paddr",
                    f"segment [{segment.gpa:#x}, {end:#x}) is not inside "
                    f"[{IMAGE_GPA:#x}, {limit_gpa:#x}); give the guest more memory",
                    segment.offset,
                )
            try:
                memory[segment.gpa : segment.gpa + len(segment.data)] = segment.data
            except LayoutError as error:
                raise ImageError(self.path, "p_paddr", str(error), segment.offset) from error


def read_image(path: Path) -> Image:
    """Read and check an image.

    :raises ImageError: if the file is absent, truncated, no such ELF, or inconsistent
    """
    data = _read(path)
    try:
        return _parse(str(path), data)
    except ImageError:
        raise
    except (struct.error, ValueError, IndexError, OverflowError) as error:
        raise ImageError(str(path), "ELF", f"damaged: {error}") from error


def _read(path: Path) -> bytes:
    try:
        kind, size = path.stat().st_mode, path.stat().st_size
        if not stat.S_ISREG(kind):
            raise ImageError(str(path), "file", "not a regular file")
        if size > MAX_IMAGE_BYTES:
            raise ImageError(str(path), "file", f"larger than {MAX_IMAGE_BYTES} bytes")
        with path.open("rb") as file:
            data = file.read(size)
    except OSError as error:
        raise ImageError(str(path), "file", error.strerror or str(error)) from error
    if data[:4] != b"\x7fELF":
        raise ImageError(str(path), "e_ident", "not an ELF file", 0)
    if len(data) < 64:
        raise ImageError(str(path), "Ehdr", f"truncated after {len(data)} bytes", len(data))
    return data


def _parse(path: str, data: bytes) -> Image:
    # pyelftools takes as long to import as a whole guest run: not for the header checks.
    if data[4] != 2 or data[5] != 1:
        raise ImageError(path, "e_ident", "need a 64-bit little-endian ELF", 4)
    kind, machine = struct.unpack_from("<HH", data, 16)
    if machine != _EM_X86_64:
        raise ImageError(path, "e_machine", f"{machine}, need {_EM_X86_64} (x86-64)", 18)
    if kind != _ET_EXEC:
        raise ImageError(path, "e_type", f"{kind}, need {_ET_EXEC} (fixed-address executable)", 16)
    entry, phoff, shoff = struct.unpack_from("<QQQ", data, 24)
    phentsize, phnum, shentsize, shnum, shstrndx = struct.unpack_from("<HHHHH", data, 54)
    segments = _segments(path, data, phoff, phentsize, phnum)
    if not any(s.gpa <= entry < s.gpa + len(s.data) for s in segments):
        raise ImageError(path, "e_entry", f"{entry:#x} is in no loaded segment", 24)
    params = _params(path, data, shoff, shentsize, shnum, shstrndx)
    return Image(path, entry, segments, params)


def _slice(path: str, data: bytes, field: str, offset: int, n_bytes: int) -> bytes:
    if offset + n_bytes > len(data):
        raise ImageError(
            path, field, f"needs bytes up to {offset + n_bytes:#x}, file has {len(data):#x}", offset
        )
    return data[offset : offset + n_bytes]


def _segments(path: str, data: bytes, phoff: int, size: int, count: int) -> tuple[Segment, ...]:
    if size != 56 or count == 0:
        raise ImageError(path, "e_phentsize", f"{count} program headers of {size} bytes", 54)
    segments = []
    for i in range(count):
        at = phoff + i * size
        raw = _slice(path, data, "Phdr", at, size)
        kind, _flags, offset, _vaddr, paddr, filesz, memsz, _align = struct.unpack("<IIQQQQQQ", raw)
        if kind != 1 or memsz == 0:  # PT_LOAD
            continue
        if memsz < filesz:
            raise ImageError(path, "p_memsz", f"{memsz:#x} is below p_filesz {filesz:#x}", at)
        segments.append(Segment(paddr, _slice(path, data, "p_offset", offset, filesz), memsz, at))
    if not segments:
        raise ImageError(path, "Phdr", "nothing to load", phoff)
    return tuple(segments)


def _params(
    path: str, data: bytes, shoff: int, size: int, count: int, names_index: int
) -> tuple[Param, ...]:
    if count == 0:
        return ()
    if size != 64 or names_index >= count:
        raise ImageError(path, "e_shentsize", f"{count} section headers of {size} bytes", 58)
    headers = [
        struct.unpack("<IIQQQQ", _slice(path, data, "Shdr", shoff + i * size, size)[:40])
        for i in range(count)
    ]
    names = _slice(path, data, ".shstrtab", headers[names_index][4], headers[names_index][5])
    for name_at, _kind, _flags, _addr, offset, n_bytes in headers:
        name = names[name_at : names.index(b"\0", name_at)] if name_at < len(names) else b""
        if name.decode("ascii", "replace") == PARAMS_SECTION:
            return _parse_params(path, offset, _slice(path, data, PARAMS_SECTION, offset, n_bytes))
    return ()


def _parse_params(path: str, offset: int, raw: bytes) -> tuple[Param, ...]:
    params = []
    for line in raw.decode("utf-8").split("\0"):
        if not line:
            continue
        name, equals, rest = line.partition("=")
        default, _, text = rest.partition(";")
        if not equals or not name.isidentifier() or not default.isdecimal():
            raise ImageError(path, PARAMS_SECTION, f"line {line!r}: need name=number;help", offset)
        if int(default) >> 64:
            raise ImageError(path, PARAMS_SECTION, f"{name}: default is over 64 bits", offset)
        params.append(Param(name, int(default), text.strip()))
    if len(params) > MAX_PARAMS:
        raise ImageError(path, PARAMS_SECTION, f"{len(params)} lines, at most {MAX_PARAMS}", offset)
    if len({param.name for param in params}) < len(params):
        raise ImageError(path, PARAMS_SECTION, "a name stands there twice", offset)
    return tuple(params)
