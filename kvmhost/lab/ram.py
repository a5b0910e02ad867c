"""The memory of an emulated host: a file, and where its bytes lie in that host's physical space."""

from __future__ import annotations

import dataclasses
import mmap
import os
from pathlib import Path
from typing import Self

from kvmhost._ffi import ffi
from kvmhost.errors import HostError, LayoutError
from kvmhost.files import os_errors
from kvmhost.mmu.tablemem import TableMemory
from kvmhost.units import PAGE_BYTES

__all__ = ["HostMemory", "RamPart", "ram_layout"]

_GIB = 1 << 30
#: QEMU's pc machine: with this much memory or more, what is above 3 GiB moves to 4 GiB.
_PC_SPLIT_FROM = 0xE000_0000
_PC_LOW = 3 * _GIB
_PC_HIGH_PA = 4 * _GIB
#: QEMU's virt machine: memory begins at 1 GiB.
_VIRT_PA = _GIB


@dataclasses.dataclass(frozen=True)
class RamPart:
    """``n_bytes`` of the file from ``offset``, at physical address ``pa`` of the host."""

    pa: int
    offset: int
    n_bytes: int


def ram_layout(machine: str, mem_bytes: int) -> tuple[RamPart, ...]:
    """Return where the memory of one of QEMU's machines lies.

    :param machine: QEMU's machine type, with or without properties: pc, virt or powernv9
    :raises LayoutError: for any other machine

    Source: QEMU 7.2, hw/i386/pc_piix.c, hw/arm/virt.c, hw/ppc/pnv.c.
    """
    kind = machine.split(",")[0]
    if kind == "pc":
        if mem_bytes < _PC_SPLIT_FROM:
            return (RamPart(0, 0, mem_bytes),)
        high = RamPart(_PC_HIGH_PA, _PC_LOW, mem_bytes - _PC_LOW)
        return (RamPart(0, 0, _PC_LOW), high)
    if kind == "virt":
        return (RamPart(_VIRT_PA, 0, mem_bytes),)
    if kind.startswith("powernv"):
        return (RamPart(0, 0, mem_bytes),)
    raise LayoutError(f"machine {kind!r}: its memory layout is not known")


class HostMemory:
    """A host's memory, mapped shared: what is written here, that host sees.

    :param path: the file
    :param parts: where its bytes lie; from :func:`ram_layout`
    :raises HostError: if the file cannot be mapped, or is shorter than its parts
    """

    def __init__(self, path: Path, parts: tuple[RamPart, ...]) -> None:
        self.parts = parts
        need = max(part.offset + part.n_bytes for part in parts)
        with os_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                # A page of a mapping beyond the end of its file would be a fatal signal.
                if os.fstat(fd).st_size < need:
                    raise HostError(str(path), 0, f"it is shorter than {need} bytes")
                self._map = mmap.mmap(fd, need)
            finally:
                os.close(fd)
        self._view = ffi.from_buffer(self._map)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap it; tables over this memory must be closed before."""
        ffi.release(self._view)
        self._map.close()

    def table_memory(self) -> TableMemory:
        """Return the memory as walkers take it."""
        # SAFETY: the view keeps the mapping from being unmapped; this object owns both.
        base = int(ffi.cast("uintptr_t", self._view))
        return TableMemory(
            [(p.pa, base + p.offset, p.n_bytes - p.n_bytes % PAGE_BYTES) for p in self.parts], self
        )
