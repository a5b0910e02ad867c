"""The initial state of a ``pc`` guest: memory contents and registers.

Each loader module (multiboot, pvh, plain) turns a file into a :class:`PcImage`; the
boot protocol's own structures are made in :meth:`PcImage.plan`, when memory size,
command line and modules are known.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import Protocol

from kvmhost.errors import ImageError
from kvmhost.memory.guest import GuestMemory
from kvmhost.memory.pclayout import EBDA_GPA, PcLayout
from kvmhost.units import PAGE_BYTES

__all__ = [
    "BootPlan",
    "BootRequest",
    "Chunk",
    "Mode",
    "Module",
    "PcEntry",
    "PcImage",
    "check_fit",
    "page_up",
    "place",
]

#: Low memory that boot information may use: above the interrupt vectors and the BIOS data
#: area, below the extended one.
_LOW_START_GPA, _LOW_END_GPA = 0x1000, EBDA_GPA


class Mode(enum.Enum):
    """Processor mode at the first instruction; privilege level 0 in each."""

    REAL = "real"
    PROTECTED = "protected"  # 32 bits, paging off
    LONG = "long"  # 64 bits, the first 4 GiB mapped one to one


@dataclasses.dataclass(frozen=True)
class PcEntry:
    """Registers of the boot processor; everything not named is 0 or as after reset."""

    mode: Mode
    rip: int
    rax: int = 0
    rbx: int = 0
    rdx: int = 0
    rsi: int = 0
    rsp: int = 0


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Bytes for memory; ``mem_bytes`` beyond the data are zero.

    :ivar field: the image's field with the address; ``offset`` is its offset in the file
    """

    gpa: int
    data: bytes
    mem_bytes: int
    field: str = "load address"
    offset: int | None = None

    @property
    def end(self) -> int:
        """First gpa after it."""
        return self.gpa + self.mem_bytes


@dataclasses.dataclass(frozen=True)
class Module:
    """A file beside the image, and its argument string."""

    path: str
    arguments: str
    data: bytes


@dataclasses.dataclass(frozen=True)
class BootRequest:
    """The data that the boot protocol passes to the guest."""

    layout: PcLayout
    command_line: str
    modules: Sequence[Module] = ()


@dataclasses.dataclass(frozen=True)
class BootPlan:
    """All chunks to load, in this order, and the entry state."""

    path: str
    chunks: tuple[Chunk, ...]
    entry: PcEntry

    def load(self, memory: GuestMemory, layout: PcLayout) -> None:
        """Copy all chunks.

        :raises ImageError: if one is not inside low memory, below the firmware's tables
        """
        written: list[tuple[int, int]] = []
        for chunk in self.chunks:
            check_fit(self.path, chunk, layout)
            data_end = chunk.gpa + len(chunk.data)
            memory[chunk.gpa : data_end] = chunk.data
            # Memory starts as zeros: only an earlier chunk can have written to it.
            for start, end in written:
                start, end = max(start, data_end), min(end, chunk.end)
                if start < end:
                    memory[start:end] = bytes(end - start)
            written.append((chunk.gpa, data_end))


class PcImage(Protocol):
    """An image that was read and checked."""

    @property
    def path(self) -> str:
        """The file, for messages."""

    @property
    def loader(self) -> str:
        """The name of its loader."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Requests of the image that are not met, one line each."""

    def plan(self, request: BootRequest) -> BootPlan:
        """Return the chunks to load and the entry state."""


def check_fit(path: str, chunk: Chunk, layout: PcLayout) -> None:
    """Check that a chunk lies in low memory, below the firmware's tables.

    :raises ImageError: if not
    """
    if chunk.gpa < 0 or chunk.end > layout.tables_gpa:
        raise ImageError(
            path,
            chunk.field,
            f"[{chunk.gpa:#x}, {chunk.end:#x}) is not inside [0, "
            f"{layout.tables_gpa:#x}); give the guest more memory",
            chunk.offset,
        )


def place(path: str, taken: Iterable[Chunk], data: bytes, preferred_gpa: int, field: str) -> Chunk:
    """Return a chunk of low memory that overlaps none of ``taken``.

    :param preferred_gpa: its gpa if that range is free, else the lowest free page
    :raises ImageError: if low memory has no room
    """
    taken = list(taken)
    candidates = [preferred_gpa, *range(_LOW_START_GPA, _LOW_END_GPA - len(data), PAGE_BYTES)]
    for gpa in candidates:
        end = gpa + len(data)
        if not any(chunk.gpa < end and gpa < chunk.end for chunk in taken):
            return Chunk(gpa, data, len(data), field)
    problem = (
        f"{len(data)} bytes: the image leaves no room between {_LOW_START_GPA:#x} and "
        f"{_LOW_END_GPA:#x}; load it above 1 MiB"
    )
    raise ImageError(path, field, problem)


def page_up(n_bytes: int) -> int:
    """Round up to whole pages."""
    return -(-n_bytes // PAGE_BYTES) * PAGE_BYTES
