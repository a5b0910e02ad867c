"""Images without a boot protocol: ELF executables and bare bytes, at privilege level 0.

======  ==========================================================================
loader  starts
======  ==========================================================================
elf     at ``e_entry``: 32-bit protected mode for ELF 32, 64-bit mode for ELF 64
flat16  the file at 0x7c00, real mode, as a boot sector (dl = 0x80)
flat32  the file at 1 MiB, 32-bit protected mode, at its first byte
======  ==========================================================================

ebx is the address of the same information as for a multiboot image, eax is 0.
"""

from __future__ import annotations

import dataclasses

from kvmhost.boot.elf import EM_386, EM_X86_64, ET_EXEC, Elf
from kvmhost.boot.multiboot import MultibootImage
from kvmhost.boot.pcboot import BootPlan, BootRequest, Chunk, Mode, PcEntry
from kvmhost.errors import ImageError

__all__ = ["PlainImage", "parse_flat", "parse_plain_elf"]

FLAT16_GPA, FLAT32_GPA = 0x7C00, 0x10_0000
FLAT16_BYTES = 0x9_0000


@dataclasses.dataclass(frozen=True)
class PlainImage:
    """A checked image."""

    path: str
    chunks: tuple[Chunk, ...]
    entry: PcEntry
    loader: str
    remarks: tuple[str, ...] = ()

    def plan(self, request: BootRequest) -> BootPlan:
        """Lay out the image, and the boot information beside it."""
        if self.entry.mode is Mode.REAL:
            return BootPlan(self.path, self.chunks, self.entry)
        informed = MultibootImage(self.path, self.chunks, self.entry.rip).plan(request)
        entry = dataclasses.replace(self.entry, rbx=informed.entry.rbx)
        return dataclasses.replace(informed, entry=entry)


def parse_plain_elf(elf: Elf) -> PlainImage:
    """Check an ELF executable.

    :raises ImageError: if it is not an x86 executable, or its entry is outside the segments
    """
    if elf.machine not in (EM_386, EM_X86_64):
        raise ImageError(elf.path, "e_machine", f"{elf.machine}, need {EM_386} or {EM_X86_64}", 18)
    if elf.kind != ET_EXEC:
        problem = f"{elf.kind}, need {ET_EXEC} (fixed-address executable)"
        raise ImageError(elf.path, "e_type", problem, 16)
    chunks = tuple(
        Chunk(phdr.paddr, elf.contents(phdr), phdr.memsz, "p_paddr", phdr.at)
        for phdr in elf.loads()
    )
    entry = elf.entry_paddr()
    if not any(chunk.gpa <= entry < chunk.end for chunk in chunks):
        raise ImageError(elf.path, "e_entry", f"{elf.entry:#x} is in no loaded segment", 24)
    mode = Mode.LONG if elf.is_64 else Mode.PROTECTED
    return PlainImage(elf.path, chunks, PcEntry(mode, entry, rsp=0x7000), "elf")


def parse_flat(path: str, data: bytes, loader: str) -> PlainImage:
    """Check a flat binary.

    :param loader: ``flat16`` or ``flat32``
    :raises ImageError: if it is empty, or too long for real mode
    """
    if not data:
        raise ImageError(path, "file", "empty", 0)
    if loader == "flat16" and len(data) > FLAT16_BYTES:
        raise ImageError(path, "file", f"longer than {FLAT16_BYTES:#x} bytes", FLAT16_BYTES)
    gpa = FLAT16_GPA if loader == "flat16" else FLAT32_GPA
    mode = Mode.REAL if loader == "flat16" else Mode.PROTECTED
    entry = PcEntry(mode, gpa, rdx=0x80 if loader == "flat16" else 0, rsp=0x7000)
    return PlainImage(path, (Chunk(gpa, data, len(data), "file", 0),), entry, loader)
