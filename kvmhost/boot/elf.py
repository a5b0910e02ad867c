"""ELF files, 32 and 64 bits, little-endian: header, segments, sections and notes.

Files are untrusted: any defect raises an
:class:`~kvmhost.errors.ImageError` that names file, field and offset. Field names are
those of elf(5). Sizes in headers are used only after a check that the file
holds that many bytes.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path

from kvmhost.errors import ImageError
from kvmhost.files import read_regular

__all__ = [
    "EM_386",
    "EM_X86_64",
    "ET_EXEC",
    "MAX_IMAGE_BYTES",
    "Elf",
    "Note",
    "Phdr",
    "check_range",
    "is_elf",
    "parse_elf",
    "read_file",
    "take",
]

MAX_IMAGE_BYTES = 256 << 20

ET_EXEC = 2
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_NOTE = 1, 4
PF_X = 1

_MAX_HEADERS = 4096


@dataclasses.dataclass(frozen=True)
class Phdr:
    """One program header; ``at`` is its own offset in the file."""

    at: int
    kind: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


@dataclasses.dataclass(frozen=True)
class Note:
    """One note: owner without its NUL, type, and contents."""

    owner: bytes
    kind: int
    data: bytes
    at: int


@dataclasses.dataclass(frozen=True)
class Elf:
    """A parsed header; everything else is read on demand."""

    path: str
    data: bytes
    is_64: bool
    kind: int
    machine: int
    entry: int
    phdrs: tuple[Phdr, ...]
    shoff: int
    shentsize: int
    shnum: int
    shstrndx: int

    def loads(self) -> Iterator[Phdr]:
        """Yield the segments that occupy memory, checked against the file.

        :raises ImageError: if one is longer in the file than in memory, or cut off, or if
            all together are larger than any image may be
        """
        total = 0
        for phdr in self.phdrs:
            if phdr.kind != PT_LOAD or phdr.memsz == 0:
                continue
            if phdr.memsz < phdr.filesz:
                problem = f"{phdr.memsz:#x} is below p_filesz {phdr.filesz:#x}"
                raise ImageError(self.path, "p_memsz", problem, phdr.at)
            check_range(self.path, self.data, "p_offset", phdr.offset, phdr.filesz)
            total += phdr.filesz
            if total > MAX_IMAGE_BYTES:
                problem = f"segments of more than {MAX_IMAGE_BYTES} bytes"
                raise ImageError(self.path, "p_filesz", problem, phdr.at)
            yield phdr

    def contents(self, phdr: Phdr) -> bytes:
        """Return a segment's bytes in the file."""
        return take(self.path, self.data, "p_offset", phdr.offset, phdr.filesz)

    def entry_paddr(self) -> int:
        """Return the entry as a physical address.

        ``e_entry`` is a virtual one; where the executable segment around it has another
        physical address, it moves along.
        """
        for phdr in self.loads():
            inside = phdr.vaddr <= self.entry < phdr.vaddr + phdr.filesz
            if inside and phdr.flags & PF_X and phdr.vaddr != phdr.paddr:
                return self.entry - phdr.vaddr + phdr.paddr
        return self.entry

    def notes(self) -> Iterator[Note]:
        """Yield the notes of all PT_NOTE segments.

        :raises ImageError: if one is cut off, or if the segments together are larger than
            the file, which only overlapping ones can be
        """
        total = 0
        for phdr in self.phdrs:
            if phdr.kind == PT_NOTE:
                total += phdr.filesz
                if total > len(self.data):
                    problem = f"note segments of {total:#x} bytes in all, file has fewer"
                    raise ImageError(self.path, "p_filesz", problem, phdr.at)
                yield from self._notes_of(phdr)

    def _notes_of(self, phdr: Phdr) -> Iterator[Note]:
        raw = take(self.path, self.data, "p_offset", phdr.offset, phdr.filesz)
        # The gABI aligns notes to 8 bytes in segments with that alignment, in both classes.
        align = 8 if phdr.align == 8 else 4
        at = 0
        while at + 12 <= len(raw):
            name_size, desc_size, kind = struct.unpack_from("<III", raw, at)
            name_at, desc_at = at + 12, _up(at + 12 + name_size, align)
            where = phdr.offset + at
            if desc_at + desc_size > len(raw):
                raise ImageError(self.path, "n_descsz", "note runs past its segment", where)
            owner = raw[name_at : name_at + name_size].rstrip(b"\0")
            yield Note(owner, kind, raw[desc_at : desc_at + desc_size], where)
            at = _up(desc_at + desc_size, align)

    def section(self, wanted: str) -> tuple[int, bytes] | None:
        """Return offset and bytes of the section of that name, or None.

        :raises ImageError: if the section table is damaged
        """
        if self.shnum == 0:
            return None
        size, layout = (64, "<IIQQQQ") if self.is_64 else (40, "<IIIIII")
        if self.shentsize != size or self.shstrndx >= self.shnum:
            problem = f"{self.shnum} section headers of {self.shentsize} bytes"
            raise ImageError(self.path, "e_shentsize", problem, 58 if self.is_64 else 46)
        table = take(self.path, self.data, "Shdr", self.shoff, size * self.shnum)
        headers = [struct.unpack_from(layout, table, i * size) for i in range(self.shnum)]
        names = self._bytes_of(".shstrtab", headers[self.shstrndx])
        for header in headers:
            # Compared in place: names may overlap, each as long as the whole table.
            if names.startswith(wanted.encode() + b"\0", header[0]):
                return header[4], self._bytes_of(wanted, header)
        return None

    def _bytes_of(self, name: str, header: tuple[int, ...]) -> bytes:
        return take(self.path, self.data, name, header[4], header[5])


def is_elf(data: bytes) -> bool:
    """Return whether the file has the ELF magic number."""
    return data[:4] == b"\x7fELF"


def parse_elf(path: str, data: bytes) -> Elf:
    """Read the header and the program headers.

    :raises ImageError: if they are damaged, cut off, or not little-endian
    """
    if not is_elf(data):
        raise ImageError(path, "e_ident", "not an ELF file", 0)
    if len(data) < 52:
        raise ImageError(path, "Ehdr", f"truncated after {len(data)} bytes", len(data))
    if data[4] not in (1, 2) or data[5] != 1:
        raise ImageError(path, "e_ident", "need a little-endian ELF of 32 or 64 bits", 4)
    is_64 = data[4] == 2
    if is_64 and len(data) < 64:
        raise ImageError(path, "Ehdr", f"truncated after {len(data)} bytes", len(data))
    kind, machine = struct.unpack_from("<HH", data, 16)
    entry, phoff, shoff = struct.unpack_from("<QQQ" if is_64 else "<III", data, 24)
    counts_at = 54 if is_64 else 42
    phentsize, phnum, shentsize, shnum, shstrndx = struct.unpack_from("<HHHHH", data, counts_at)
    phdrs = _phdrs(path, data, is_64, phoff, phentsize, phnum)
    return Elf(
        path, data, is_64, kind, machine, entry, phdrs, shoff, shentsize, shnum, shstrndx
    )  # fmt: skip


def take(path: str, data: bytes, field: str, offset: int, n_bytes: int) -> bytes:
    """Return bytes of the file.

    :raises ImageError: if the file is shorter
    """
    check_range(path, data, field, offset, n_bytes)
    return data[offset : offset + n_bytes]


def check_range(path: str, data: bytes, field: str, offset: int, n_bytes: int) -> None:
    """Check that the file has these bytes.

    :raises ImageError: if the file is shorter
    """
    if offset + n_bytes > len(data):
        problem = f"needs bytes up to {offset + n_bytes:#x}, file has {len(data):#x}"
        raise ImageError(path, field, problem, offset)


def read_file(path: Path, limit_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """Read a regular file.

    :raises ImageError: if it cannot be read, is not a regular file, or is too large
    """
    try:
        return read_regular(path, limit_bytes)
    except OSError as error:
        raise ImageError(str(path), "file", error.strerror or str(error)) from error


def _phdrs(
    path: str, data: bytes, is_64: bool, offset: int, size: int, count: int
) -> tuple[Phdr, ...]:
    if size != (56 if is_64 else 32) or not 0 < count <= _MAX_HEADERS:
        problem = f"{count} program headers of {size} bytes"
        raise ImageError(path, "e_phentsize", problem, 54 if is_64 else 42)
    phdrs = []
    for at in range(offset, offset + size * count, size):
        raw = take(path, data, "Phdr", at, size)
        if is_64:
            phdrs.append(Phdr(at, *struct.unpack("<IIQQQQQQ", raw)))
        else:
            kind, off, vaddr, paddr, filesz, memsz, flags, align = struct.unpack("<8I", raw)
            phdrs.append(Phdr(at, kind, flags, off, vaddr, paddr, filesz, memsz, align))
    return tuple(phdrs)


def _up(n_bytes: int, align: int) -> int:
    return (n_bytes + align - 1) & -align
