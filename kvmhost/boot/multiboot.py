"""Multiboot 1 images, with and without an ELF header.

The header lies in the first 8 KiB, at a multiple of 4. With flag bit 16 it
gives the load addresses of the file (fields ``header_addr`` to ``entry_addr``); else
the file is an ELF executable. The boot information and its addresses follow
QEMU's loader, so that an image behaves the same under both: memory map at 0x9000, information at
0x9500, strings and modules behind the image. Where the image itself occupies these
addresses, map and information move to free pages of low memory.

Multiboot2 images, and Multiboot headers behind the first 8 KiB, are refused by an
error that names them.

Source: Multiboot Specification 0.6.96, chapter 3; Multiboot2 Specification 2.0, section
3.1.1; hw/i386/multiboot.c of QEMU 7.2.
"""

from __future__ import annotations

import dataclasses
import struct

from kvmhost.boot.elf import EM_386, EM_X86_64, is_elf, parse_elf, take
from kvmhost.boot.pcboot import (
    BootPlan,
    BootRequest,
    Chunk,
    Mode,
    PcEntry,
    check_fit,
    page_up,
    place,
)
from kvmhost.errors import ImageError
from kvmhost.memory.pclayout import BOOT_INFO_GPA, BOOT_MAP_GPA, BOOT_STACK_GPA

__all__ = [
    "BOOT_MAGIC",
    "MultibootImage",
    "find_header",
    "parse_multiboot",
    "refuse_unsupported_header",
]

HEADER_MAGIC = 0x1BADB002
#: Value of eax when the image starts.
BOOT_MAGIC = 0x2BADB002
SEARCH_BYTES = 8192
HEADER_BYTES = 48
HAS_ADDRESSES = 1 << 16
WANTS_VIDEO = 1 << 2
#: Requirements that are met: page-aligned modules, memory information. Video is reported missing.
_KNOWN_REQUIREMENTS = 1 << 0 | 1 << 1 | WANTS_VIDEO
_REQUIREMENTS = 0xFFFF
MULTIBOOT2_MAGIC = 0xE85250D6
MULTIBOOT2_SEARCH_BYTES = 32768

BOOT_DEVICE = 0x8000FFFF
LOADER_NAME = b"qemu\0"

# Memory, boot device, command line, modules, memory map, loader name.
_INFO_FLAGS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
_MODULE_BYTES = 16
_LIMIT = 1 << 32
_FIELDS = ("header_addr", "load_addr", "load_end_addr", "bss_end_addr", "entry_addr")


@dataclasses.dataclass(frozen=True)
class MultibootImage:
    """A checked image: its bytes by gpa, and where it starts."""

    path: str
    chunks: tuple[Chunk, ...]
    entry: int
    loader: str = "multiboot"
    remarks: tuple[str, ...] = ()

    def plan(self, request: BootRequest) -> BootPlan:
        """Lay out strings, modules and the boot information behind the image."""
        for chunk in self.chunks:
            check_fit(self.path, chunk, request.layout)
        start = min(chunk.gpa for chunk in self.chunks)
        end = start + page_up(max(chunk.end for chunk in self.chunks) - start)
        tail, command_gpa, name_gpa = _tail(self.path, request, end)
        entries = b"".join(
            struct.pack("<IQQI", 20, entry.gpa, entry.n_bytes, entry.kind)
            for entry in request.layout.memory_map()
        )
        taken = [*self.chunks, *tail]
        memory_map = place(self.path, taken, entries, BOOT_MAP_GPA, "memory map")
        info = bytearray(88)
        where = place(
            self.path, [*taken, memory_map], bytes(info), BOOT_INFO_GPA, "boot information"
        )
        struct.pack_into(
            "<7I",
            info,
            0,
            _INFO_FLAGS,
            request.layout.mem_lower_kib,
            request.layout.mem_upper_kib,
            BOOT_DEVICE,
            command_gpa,
            len(request.modules),
            end,
        )
        struct.pack_into("<II", info, 44, len(entries), memory_map.gpa)
        struct.pack_into("<I", info, 64, name_gpa)
        state = PcEntry(
            Mode.PROTECTED, self.entry, rax=BOOT_MAGIC, rbx=where.gpa, rsp=BOOT_STACK_GPA
        )
        chunks = (*self.chunks, *tail, memory_map, dataclasses.replace(where, data=bytes(info)))
        return BootPlan(self.path, chunks, state)


def find_header(data: bytes) -> int | None:
    """Return the offset of the multiboot header, or None."""
    head = data[:SEARCH_BYTES].ljust(SEARCH_BYTES, b"\0")
    for at in range(0, SEARCH_BYTES - HEADER_BYTES, 4):
        magic, flags, checksum = struct.unpack_from("<III", head, at)
        if magic == HEADER_MAGIC and (magic + flags + checksum) % _LIMIT == 0:
            return at
    return None


def parse_multiboot(path: str, data: bytes) -> MultibootImage:
    """Check an image and determine its load addresses.

    :raises ImageError: if there is no header, or it is inconsistent with itself or the file
    """
    at = find_header(data)
    if at is None:
        problem = f"no header in the first {SEARCH_BYTES} bytes with a right checksum"
        raise ImageError(path, "multiboot header", problem, 0)
    flags = struct.unpack_from("<I", take(path, data, "multiboot flags", at + 4, 4))[0]
    unknown = flags & _REQUIREMENTS & ~_KNOWN_REQUIREMENTS
    if unknown:
        problem = f"{flags:#x} requires bits {unknown:#x}, which this loader does not know"
        raise ImageError(path, "multiboot flags", problem, at + 4)
    found = _by_flags(path, data, at, flags)
    if flags & WANTS_VIDEO:
        remark = f"multiboot flags at offset {at + 4:#x} require a video mode: there is no display"
        return dataclasses.replace(found, remarks=(remark,))
    return found


def refuse_unsupported_header(path: str, data: bytes) -> None:
    """Refuse a file whose boot header no loader takes.

    :raises ImageError: for a Multiboot2 header in its first 32 KiB, or a Multiboot header
        behind its first 8 KiB, with a right checksum
    """
    remedy = "use a Multiboot or PVH header, or --loader elf to enter it without boot information"
    at = _find(data, MULTIBOOT2_MAGIC, 8, 0, MULTIBOOT2_SEARCH_BYTES, 4)
    if at is not None:
        problem = f"Multiboot2, which no loader here takes; {remedy}"
        raise ImageError(path, "multiboot2 header", problem, at)
    at = _find(data, HEADER_MAGIC, 4, SEARCH_BYTES - HEADER_BYTES, len(data), 3)
    if at is not None:
        problem = (
            f"behind the first {SEARCH_BYTES} bytes, where it does not count; move it, or {remedy}"
        )
        raise ImageError(path, "multiboot header", problem, at)


def _find(data: bytes, magic: int, align: int, start: int, end: int, n_words: int) -> int | None:
    """Return the first aligned offset of ``n_words`` that begin with magic and sum to 0."""
    wanted = struct.pack("<I", magic)
    at = data.find(wanted, start, end)
    while at >= 0:
        words = data[at : at + 4 * n_words]
        whole = at % align == 0 and len(words) == 4 * n_words
        if whole and sum(struct.unpack(f"<{n_words}I", words)) % _LIMIT == 0:
            return at
        at = data.find(wanted, at + 1, end)
    return None


def _by_flags(path: str, data: bytes, at: int, flags: int) -> MultibootImage:
    if flags & HAS_ADDRESSES:
        return _by_addresses(path, data, at)
    if not is_elf(data):
        problem = "bit 16 is clear, so the file has to be ELF, and it is not"
        raise ImageError(path, "multiboot flags", problem, at + 4)
    return _by_elf(path, data)


def _by_addresses(path: str, data: bytes, at: int) -> MultibootImage:
    raw = take(path, data, "multiboot header", at + 12, 20)
    header, load, load_end, bss_end, entry = struct.unpack("<5I", raw)
    where = {name: at + 12 + 4 * i for i, name in enumerate(_FIELDS)}

    def wrong(field: str, problem: str) -> ImageError:
        return ImageError(path, field, problem, where[field])

    if header < load:
        raise wrong("load_addr", f"{load:#x} is above header_addr {header:#x}")
    if header - load > at:
        problem = f"{header:#x} is {header - load:#x} bytes after load_addr, the header at {at:#x}"
        raise wrong("header_addr", problem)
    first = at - (header - load)
    if load_end and load_end < load:
        raise wrong("load_end_addr", f"{load_end:#x} is below load_addr {load:#x}")
    n_bytes = load_end - load if load_end else len(data) - first
    if load + n_bytes >= _LIMIT:
        raise wrong("load_addr", f"{n_bytes:#x} bytes at {load:#x} end above 4 GiB")
    if bss_end and bss_end < load + n_bytes:
        raise wrong("bss_end_addr", f"{bss_end:#x} is below the end {load + n_bytes:#x}")
    if first + n_bytes > len(data):
        problem = f"{load_end:#x}: the file ends {first + n_bytes - len(data):#x} bytes before"
        raise wrong("load_end_addr", problem)
    mem_bytes = bss_end - load if bss_end else n_bytes
    chunk = Chunk(load, data[first : first + n_bytes], mem_bytes, "load_addr", where["load_addr"])
    return MultibootImage(path, (chunk,), entry)


def _by_elf(path: str, data: bytes) -> MultibootImage:
    elf = parse_elf(path, data)
    if elf.machine != (EM_X86_64 if elf.is_64 else EM_386):
        raise ImageError(path, "e_machine", f"{elf.machine} is not x86", 18)
    chunks = tuple(
        Chunk(phdr.paddr, elf.contents(phdr), phdr.memsz, "p_paddr", phdr.at)
        for phdr in elf.loads()
    )
    if not chunks:
        raise ImageError(path, "Phdr", "nothing to load", elf.phdrs[0].at)
    entry = elf.entry_paddr()
    if not any(chunk.gpa <= entry < chunk.end for chunk in chunks) or entry >= _LIMIT:
        raise ImageError(path, "e_entry", f"{elf.entry:#x} is in no loaded segment", 24)
    return MultibootImage(path, chunks, entry)


def _tail(path: str, request: BootRequest, gpa: int) -> tuple[list[Chunk], int, int]:
    """Return chunks from ``gpa`` on, and where command line and loader name are.

    In order: module list, strings (each module's, then the command line), loader name;
    from the next page on the modules, each on a page of its own.
    """
    module_strings = [_module_string(m.path, m.arguments) for m in request.modules]
    command = request.command_line.encode() + b"\0"
    strings_gpa = gpa + _MODULE_BYTES * len(request.modules)
    # QEMU's loader reserves the same amount for strings.
    joined = len(b",".join(module_strings)) + 1 if module_strings else 0
    name_gpa = strings_gpa + joined + len(command)
    next_gpa = gpa + page_up(name_gpa + len(LOADER_NAME) - gpa)
    listed, strings, chunks = b"", b"", []
    for module, text in zip(request.modules, module_strings, strict=True):
        chunk = Chunk(next_gpa, module.data, len(module.data), f"module {module.path}")
        check_fit(path, chunk, request.layout)
        chunks.append(chunk)
        end = chunk.end
        listed += struct.pack("<4I", next_gpa, end, strings_gpa + len(strings), 0)
        strings += text + b"\0"
        next_gpa = gpa + page_up(end - gpa)
    head = listed + strings + command
    chunks = [_chunk(gpa, head), _chunk(name_gpa, LOADER_NAME), *chunks]
    return chunks, strings_gpa + len(strings), name_gpa


def _module_string(path: str, arguments: str) -> bytes:
    return (f"{path} {arguments}" if arguments else path).encode()


def _chunk(gpa: int, data: bytes) -> Chunk:
    return Chunk(gpa, data, len(data), "boot information")
