"""The memory layout of a tiny 64-bit guest.

::

    0x0000_0000  never mapped, so that a null pointer faults
    0x0000_1000  parameter page (pinned)
    0x0000_2000  task state segment with the I/O permission bitmap (pinned)
    0x0001_0000  stacks, 16 KiB per vCPU
    0x0010_0000  image
         ...     free for the guest, up to the tables
    end - tables page tables (pinned, not mapped in the guest's own space)
    0xc000_0000  end of low memory; the rest continues at 4 GiB
    0xd000_0000  MMIO window, 2 MiB, mapped for the guest, backed by nothing
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from kvmhost.errors import LayoutError
from kvmhost.units import PAGE_BYTES

__all__ = [
    "HIGH_GPA",
    "IMAGE_GPA",
    "LOW_END_GPA",
    "MAX_TINY_VCPUS",
    "MIN_BYTES",
    "MMIO_BYTES",
    "MMIO_GPA",
    "PARAMS_GPA",
    "STACKS_GPA",
    "STACK_BYTES",
    "TSS_BYTES",
    "TSS_GPA",
    "Layout",
    "TinyLayout",
]

PARAMS_GPA = 0x1000
TSS_GPA = 0x2000
#: 104 bytes of TSS, one bit per port, and the byte of ones that must follow.
TSS_BYTES = 104 + 0x10000 // 8 + 1
STACKS_GPA = 0x1_0000
STACK_BYTES = 0x4000
MAX_TINY_VCPUS = 32
IMAGE_GPA = 0x10_0000
LOW_END_GPA = 0xC000_0000
MMIO_GPA = 0xD000_0000
MMIO_BYTES = 0x20_0000
HIGH_GPA = 0x1_0000_0000

#: Minimum size for parameters, stacks, an image and the tables.
MIN_BYTES = 2 << 20

_ENTRIES = 512


class Layout(Protocol):
    """The memory layout of any kind of machine."""

    @property
    def mem_bytes(self) -> int:
        """Size of guest memory."""

    @property
    def regions(self) -> list[tuple[int, int]]:
        """``(gpa, n_bytes)`` of each memory region, ascending."""

    @property
    def pinned_ranges(self) -> list[tuple[int, int]]:
        """``(gpa, n_bytes)`` that must never be evicted."""


@dataclasses.dataclass(frozen=True)
class TinyLayout:
    """The layout for a guest of ``mem_bytes``.

    :raises LayoutError: if the size is not a multiple of the page size, too small or too large
    """

    mem_bytes: int

    def __post_init__(self) -> None:
        if self.mem_bytes % PAGE_BYTES:
            raise LayoutError(f"memory size {self.mem_bytes} is not a multiple of {PAGE_BYTES}")
        if self.mem_bytes < MIN_BYTES:
            raise LayoutError(
                f"memory size {self.mem_bytes} bytes is too small: need {MIN_BYTES} or more"
            )
        if self.mem_bytes > LOW_END_GPA and self.tables_gpa < IMAGE_GPA + MIN_BYTES:
            raise LayoutError(
                f"memory size {self.mem_bytes} bytes is too large: its page tables take "
                f"{self.tables_bytes} bytes, which do not fit below {LOW_END_GPA:#x}"
            )

    @property
    def regions(self) -> list[tuple[int, int]]:
        """``(gpa, n_bytes)`` of each memory region, ascending."""
        low = min(self.mem_bytes, LOW_END_GPA)
        high = self.mem_bytes - low
        return [(0, low)] + ([(HIGH_GPA, high)] if high else [])

    @property
    def tables_bytes(self) -> int:
        """Size of the page tables: every level, for memory and the MMIO window."""
        leaf_pages = 2
        for _, n_bytes in self.regions:
            leaf_pages += -(-n_bytes // (PAGE_BYTES * _ENTRIES))
        directories = -(-leaf_pages // _ENTRIES) + 3
        return (leaf_pages + directories + 2) * PAGE_BYTES

    @property
    def tables_gpa(self) -> int:
        """Gpa of the page tables, root first, at the end of low memory."""
        return self.regions[0][1] - self.tables_bytes

    @property
    def pinned_ranges(self) -> list[tuple[int, int]]:
        """``(gpa, n_bytes)`` that must never be evicted: parameters, TSS, live tables."""
        return [
            (PARAMS_GPA, PAGE_BYTES),
            (TSS_GPA, TSS_BYTES),
            (self.tables_gpa, self.tables_bytes),
        ]

    @property
    def free_range(self) -> tuple[int, int]:
        """``[start, end)`` gpa of the largest range that an image may use freely."""
        ranges = [(IMAGE_GPA, self.tables_gpa)]
        ranges += [(gpa, gpa + n_bytes) for gpa, n_bytes in self.regions[1:]]
        return max(ranges, key=lambda pair: pair[1] - pair[0])
