"""What firmware leaves in the memory of a PC: data areas, descriptor table, ACPI tables.

Source: the BIOS data area as in RBIL's MEMORY.LST; register values at entry from the
boot protocols (see :mod:`kvmhost.boot.multiboot` and its siblings).
"""

from __future__ import annotations

import struct

from kvmhost.boot.acpi import acpi_tables
from kvmhost.memory.guest import GuestMemory
from kvmhost.memory.pclayout import EBDA_GPA, FIRMWARE_GPA, PcLayout

__all__ = ["GDT_BYTES", "GDT_GPA", "lay_out_long_tables", "write_firmware"]

GDT_GPA = FIRMWARE_GPA + 0xFE00
#: Null, 32-bit code, data, 16-bit code, 16-bit data, 64-bit code.
_GDT = (
    0,
    0x00CF9B000000FFFF,
    0x00CF93000000FFFF,
    0x00009B000000FFFF,
    0x000093000000FFFF,
    0x00AF9B000000FFFF,
)
GDT_BYTES = 8 * len(_GDT)

_LONG_MAPPED_BYTES = 4 << 30
_BIG_PAGE_BYTES = 2 << 20


def write_firmware(memory: GuestMemory, layout: PcLayout, n_cpus: int) -> None:
    """Write the data areas, the descriptor table and the ACPI tables."""
    _put(memory, 0x400, struct.pack("<H", 0x3F8))
    _put(memory, 0x40E, struct.pack("<H", EBDA_GPA >> 4))
    _put(memory, 0x413, struct.pack("<H", layout.mem_lower_kib))
    _put(memory, EBDA_GPA, b"\x01")
    _put(memory, GDT_GPA, struct.pack(f"<{len(_GDT)}Q", *_GDT))
    rsdp, tables = acpi_tables(layout.tables_gpa, n_cpus)
    _put(memory, FIRMWARE_GPA, rsdp)
    _put(memory, layout.tables_gpa, tables)


def lay_out_long_tables(memory: GuestMemory, layout: PcLayout) -> int:
    """Map the first 4 GiB one to one with 2 MiB pages; return the root's gpa."""
    root = layout.page_tables_gpa
    directories, leaves = root + 0x1000, root + 0x2000
    n_leaves = _LONG_MAPPED_BYTES // _BIG_PAGE_BYTES
    _put(memory, root, struct.pack("<Q", directories | 7))
    _put(memory, directories, struct.pack("<4Q", *(leaves + 0x1000 * i | 7 for i in range(4))))
    entries = (i * _BIG_PAGE_BYTES | 0x87 for i in range(n_leaves))
    _put(memory, leaves, struct.pack(f"<{n_leaves}Q", *entries))
    return root


def _put(memory: GuestMemory, gpa: int, data: bytes) -> None:
    memory[gpa : gpa + len(data)] = data
