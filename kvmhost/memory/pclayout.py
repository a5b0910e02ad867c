"""The memory layout of a ``pc`` guest, as left by PC firmware.

::

    0x0000_0400  BIOS data area: serial port, EBDA segment, kilobytes below
    0x0000_9000  multiboot and PVH: memory map, and the boot information at 0x9500
    0x0009_fc00  extended BIOS data area, 1 KiB (reserved)
    0x000f_0000  RSDP, GDT of the entry state (reserved)
    0x0010_0000  memory for the guest; an image is usually here
    end - 128 K  ACPI tables, then page tables for 64-bit entry (reserved)
    0xc000_0000  end of low memory with 3.5 GiB or more; the rest continues at 4 GiB
    0xfec0_0000  I/O APIC, 0xfee0_0000 local APICs, in the kernel
    0xfeff_c000  identity map and task state segment of KVM (reserved)
    0xff00_0000  memory of the test device
    0xfd_0000_0000  kept by AMD processors (reserved)
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from pathlib import Path

from kvmhost.errors import LayoutError
from kvmhost.memory.layout import HIGH_GPA, LOW_END_GPA
from kvmhost.units import PAGE_BYTES

__all__ = [
    "BOOT_INFO_GPA",
    "BOOT_MAP_GPA",
    "BOOT_STACK_GPA",
    "EBDA_GPA",
    "FIRMWARE_GPA",
    "MapEntry",
    "MapType",
    "PcLayout",
]

#: Where QEMU's loaders put the memory map and the boot information, and where the stack of the
#: entry state ends.
BOOT_MAP_GPA, BOOT_INFO_GPA, BOOT_STACK_GPA = 0x9000, 0x9500, 0x7000
EBDA_GPA = 0x9_FC00
FIRMWARE_GPA = 0xF_0000
ONE_MIB = 0x10_0000
IDENTITY_MAP_GPA = 0xFEFF_C000
KVM_TSS_GPA = 0xFEFF_D000
KVM_PAGES_BYTES = 0x4000
ROM_GPA = 0xFFFC_0000
HYPERTRANSPORT_GPA, HYPERTRANSPORT_BYTES = 0xFD_0000_0000, 0x3_0000_0000

TABLES_BYTES = 0x2_0000
PAGE_TABLES_OFFSET = 0x1_0000
MIN_PC_BYTES = 2 << 20
ONE_PIECE_BYTES = 0xE000_0000
MAX_PC_BYTES = 1 << 40


class MapType(enum.IntEnum):
    """Types of the firmware's memory map (E820)."""

    USABLE = 1
    RESERVED = 2


@dataclasses.dataclass(frozen=True)
class MapEntry:
    """One entry of the memory map."""

    gpa: int
    n_bytes: int
    kind: MapType


@dataclasses.dataclass(frozen=True)
class PcLayout:
    """The layout for a guest of ``mem_bytes``.

    :raises LayoutError: if the size is not a multiple of the page size or out of range
    """

    mem_bytes: int

    def __post_init__(self) -> None:
        if self.mem_bytes % PAGE_BYTES:
            raise LayoutError(f"memory size {self.mem_bytes} is not a multiple of {PAGE_BYTES}")
        if not MIN_PC_BYTES <= self.mem_bytes <= MAX_PC_BYTES:
            raise LayoutError(
                f"memory size {self.mem_bytes} bytes: a pc takes "
                f"{MIN_PC_BYTES} to {MAX_PC_BYTES}; too small or too large"
            )

    @property
    def low_end(self) -> int:
        """End of memory below 4 GiB: up to 3.5 GiB are contiguous, more is split at 3."""
        return self.mem_bytes if self.mem_bytes < ONE_PIECE_BYTES else LOW_END_GPA

    @property
    def regions(self) -> list[tuple[int, int]]:
        """``(gpa, n_bytes)`` of each memory region, ascending."""
        high = self.mem_bytes - self.low_end
        return [(0, self.low_end)] + ([(HIGH_GPA, high)] if high else [])

    @property
    def tables_gpa(self) -> int:
        """Gpa of the ACPI tables: the last 128 KiB of low memory."""
        return self.low_end - TABLES_BYTES

    @property
    def page_tables_gpa(self) -> int:
        """Gpa of the page tables for a 64-bit entry."""
        return self.tables_gpa + PAGE_TABLES_OFFSET

    @property
    def pinned_ranges(self) -> list[tuple[int, int]]:
        """``(gpa, n_bytes)`` that must never be evicted: none; the guest owns all of it."""
        return []

    @property
    def mem_lower_kib(self) -> int:
        """KiB from 0 that a guest may use."""
        return EBDA_GPA // 1024

    @property
    def mem_upper_kib(self) -> int:
        """KiB from 1 MiB up to the first hole."""
        return (self.tables_gpa - ONE_MIB) // 1024

    def memory_map(self) -> list[MapEntry]:
        """Return the firmware's memory map, ascending."""
        usable, reserved = MapType.USABLE, MapType.RESERVED
        entries = [
            MapEntry(0, EBDA_GPA, usable),
            MapEntry(EBDA_GPA, 0x400, reserved),
            MapEntry(FIRMWARE_GPA, 0x1_0000, reserved),
            MapEntry(ONE_MIB, self.tables_gpa - ONE_MIB, usable),
            MapEntry(self.tables_gpa, TABLES_BYTES, reserved),
            MapEntry(IDENTITY_MAP_GPA, KVM_PAGES_BYTES, reserved),
            MapEntry(ROM_GPA, HIGH_GPA - ROM_GPA, reserved),
        ]
        entries += [MapEntry(gpa, n_bytes, usable) for gpa, n_bytes in self.regions[1:]]
        if _is_amd():
            entries.append(MapEntry(HYPERTRANSPORT_GPA, HYPERTRANSPORT_BYTES, reserved))
        return entries


@functools.cache
def _is_amd() -> bool:
    """Return whether the processor reserves the end of its first TiB for HyperTransport."""
    try:
        with Path("/proc/cpuinfo").open("rb") as file:
            return b"AuthenticAMD" in file.read(256)
    except OSError:
        return False
