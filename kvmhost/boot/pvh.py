"""ELF images that start by the PVH boot protocol: a note names a 32-bit entry.

Source: docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h of Xen 4.17.
"""

from __future__ import annotations

import dataclasses
import struct

from kvmhost.boot.elf import Elf
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
from kvmhost.memory.pclayout import BOOT_INFO_GPA, BOOT_MAP_GPA, BOOT_STACK_GPA, FIRMWARE_GPA

__all__ = ["PvhImage", "find_entry", "parse_pvh"]

OWNER, PHYS32_ENTRY = b"Xen", 18
MAGIC = 0x336EC578


@dataclasses.dataclass(frozen=True)
class PvhImage:
    """A checked image."""

    path: str
    chunks: tuple[Chunk, ...]
    entry: int
    loader: str = "pvh"
    remarks: tuple[str, ...] = ()

    def plan(self, request: BootRequest) -> BootPlan:
        """Lay out the start information; ebx points to it."""
        for chunk in self.chunks:
            check_fit(self.path, chunk, request.layout)
        gpa = page_up(max(chunk.end for chunk in self.chunks))
        command = request.command_line.encode() + b"\0"
        listed, chunks = b"", [Chunk(gpa, command, len(command), "command line")]
        at = gpa + len(command)
        for module in request.modules:
            at = page_up(at)
            listed += struct.pack("<4Q", at, len(module.data), 0, 0)
            chunks.append(Chunk(at, module.data, len(module.data), f"module {module.path}"))
            at += len(module.data)
        list_gpa = page_up(at)
        chunks.append(Chunk(list_gpa, listed, len(listed), "module list"))
        entries = request.layout.memory_map()
        table = b"".join(struct.pack("<QQII", e.gpa, e.n_bytes, e.kind, 0) for e in entries)
        taken = [*self.chunks, *chunks]
        memory_map = place(self.path, taken, table, BOOT_MAP_GPA, "memory map")
        info = struct.pack(
            "<4I4Q2I", MAGIC, 1, 0, len(request.modules), list_gpa if listed else 0, gpa,
            FIRMWARE_GPA, memory_map.gpa, len(entries), 0,
        )  # fmt: skip
        start_info = place(
            self.path, [*taken, memory_map], info, BOOT_INFO_GPA, "start information"
        )
        state = PcEntry(Mode.PROTECTED, self.entry, rbx=start_info.gpa, rsp=BOOT_STACK_GPA)
        return BootPlan(self.path, (*taken, memory_map, start_info), state)


def find_entry(elf: Elf) -> int | None:
    """Return the entry that the note names, or None.

    :raises ImageError: if a note is damaged
    """
    for note in elf.notes():
        if note.owner == OWNER and note.kind == PHYS32_ENTRY:
            if len(note.data) not in (4, 8):
                problem = f"{len(note.data)} bytes for an entry address"
                raise ImageError(elf.path, "PVH note", problem, note.at)
            return int.from_bytes(note.data, "little")
    return None


def parse_pvh(elf: Elf) -> PvhImage:
    """Check an image.

    :raises ImageError: if there is no note, or it points outside the image
    """
    entry = find_entry(elf)
    if entry is None:
        raise ImageError(elf.path, "PVH note", "no note of owner Xen and type 18")
    chunks = tuple(
        Chunk(phdr.paddr, elf.contents(phdr), phdr.memsz, "p_paddr", phdr.at)
        for phdr in elf.loads()
    )
    if not any(chunk.gpa <= entry < chunk.end for chunk in chunks) or entry >> 32:
        raise ImageError(elf.path, "PVH note", f"entry {entry:#x} is in no loaded segment")
    return PvhImage(elf.path, chunks, entry)
