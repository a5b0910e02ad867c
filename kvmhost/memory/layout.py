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
from kvmhost.units import HUGE_PAGE_BYTES, PAGE_BYTES

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
    "AliasedLayout",
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
_GIB = 1 << 30
#: Parameters and task state segment, in whole pages.
_LOW_MAPPED = (
    (PARAMS_GPA, PARAMS_GPA + PAGE_BYTES),
    (TSS_GPA, -(-(TSS_GPA + TSS_BYTES) // PAGE_BYTES) * PAGE_BYTES),
)
#: Where a guest's page tables are that does not have them at the end of its memory.
_FIXED_TABLES_GPA = 2 << 20


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
    def mapped_ranges(self) -> list[tuple[int, int]]:
        """``[start, end)`` gpas that the guest's tables map with leaves of 4 KiB."""
        return [
            *_LOW_MAPPED,
            (STACKS_GPA, self.tables_gpa),
            *((gpa, gpa + n_bytes) for gpa, n_bytes in self.regions[1:]),
            (MMIO_GPA, MMIO_GPA + MMIO_BYTES),
        ]

    @property
    def huge_ranges(self) -> list[tuple[int, int]]:
        """``[start, end)`` gpas that they map with leaves of 2 MiB."""
        return []

    @property
    def free_range(self) -> tuple[int, int]:
        """``[start, end)`` gpa of the largest range that an image may use freely."""
        ranges = [(IMAGE_GPA, self.tables_gpa)]
        ranges += [(gpa, gpa + n_bytes) for gpa, n_bytes in self.regions[1:]]
        return max(ranges, key=lambda pair: pair[1] - pair[0])


@dataclasses.dataclass(frozen=True)
class AliasedLayout(TinyLayout):
    """The layout of a tiny guest that sees one piece of memory many times over.

    ::

        0x0000_0000  as in TinyLayout, up to the image
        0x0020_0000  page tables (pinned)
        0x1_0000_0000  span_bytes of memory, in memslots of piece_bytes, all over one piece

    The tables map the span with leaves of 2 MiB.

    :param mem_bytes: all memory, as :meth:`of` computes it
    :param piece_bytes: the piece, a multiple of 2 MiB
    :param span_bytes: a multiple of the piece
    :raises LayoutError: if a size is not such a multiple, or 0
    """

    piece_bytes: int = 0
    span_bytes: int = 0

    @classmethod
    def of(cls, piece_bytes: int, span_bytes: int) -> AliasedLayout:
        """Return the layout for a span over a piece."""
        return cls(_low_bytes(span_bytes) + piece_bytes, piece_bytes, span_bytes)

    def __post_init__(self) -> None:
        if self.piece_bytes <= 0 or self.piece_bytes % HUGE_PAGE_BYTES:
            raise LayoutError(f"memslot size {self.piece_bytes} is not a multiple of 2 MiB")
        if self.span_bytes <= 0 or self.span_bytes % self.piece_bytes:
            raise LayoutError(
                f"memory size {self.span_bytes} is not a multiple of the memslot size "
                f"{self.piece_bytes}"
            )

    @property
    def n_slots(self) -> int:
        """Memslots over the piece, its own included."""
        return self.span_bytes // self.piece_bytes

    @property
    def regions(self) -> list[tuple[int, int]]:
        """``(gpa, n_bytes)`` of low memory and of the piece."""
        return [(0, _low_bytes(self.span_bytes)), (HIGH_GPA, self.piece_bytes)]

    @property
    def tables_bytes(self) -> int:
        """Size of the page tables."""
        return _tables_bytes(self.span_bytes)

    @property
    def tables_gpa(self) -> int:
        """Gpa of the page tables, root first."""
        return _FIXED_TABLES_GPA

    @property
    def mapped_ranges(self) -> list[tuple[int, int]]:
        """``[start, end)`` gpas that the guest's tables map with leaves of 4 KiB."""
        return [*_LOW_MAPPED, (STACKS_GPA, self.tables_gpa)]

    @property
    def huge_ranges(self) -> list[tuple[int, int]]:
        """``[start, end)`` gpas that they map with leaves of 2 MiB."""
        return [(HIGH_GPA, HIGH_GPA + self.span_bytes)]


def _tables_bytes(span_bytes: int) -> int:
    """Root, three tables of low memory, and those of the span that starts at 4 GiB."""
    end = HIGH_GPA + span_bytes
    directories = -(-end // _GIB) - HIGH_GPA // _GIB
    return (1 + 3 + -(-end // (_ENTRIES * _GIB)) + directories) * PAGE_BYTES


def _low_bytes(span_bytes: int) -> int:
    whole = _FIXED_TABLES_GPA + _tables_bytes(span_bytes)
    return -(-whole // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
