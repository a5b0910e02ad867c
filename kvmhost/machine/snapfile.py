"""The snapshot file: its format, and the checks before anything is allocated.

Little-endian::

    0   8 bytes  magic "KVMSNAP\\0"
    8   u32      version, 2
    12  u32      CRC-32C of the 28 bytes that follow
    16  u64      bytes of the state
    24  u64      pages of memory in the file
    32  u32      CRC-32C of the state
    36  u32      CRC-32C of the table
    40  u32      zero
    44           state, JSON: see :class:`State`
    ...          zeros up to a multiple of 4096
    ...          memory: the pages that are not zero, by ascending gpa
    ...          table: 36 bytes for each chunk of 256 pages of each memory region: a bitmap
                 of the pages that are in the file, and the CRC-32C of these pages (0: none)

The table follows from the size of the VM, the memory from the table, and the size of the
file from all of these: a file of another size is refused. No page in the file is all
zero, so that the cost of restoring follows from the file's header, even for a sparse file.
Files of version 1 are refused.
"""

from __future__ import annotations

import os
import stat
import struct
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from kvmhost.errors import ImageError, LayoutError
from kvmhost.machine.chunks import CHUNK_PAGES, ChunkRange, chunk_ranges, crc32c
from kvmhost.machine.vcpustate import BoardState, SavedVcpu
from kvmhost.memory.layout import TinyLayout
from kvmhost.memory.pclayout import PcLayout
from kvmhost.units import PAGE_BYTES

__all__ = [
    "HEAD",
    "MAGIC",
    "MAX_STATE_BYTES",
    "TABLE_ENTRY",
    "VERSION",
    "State",
    "check_mem_bytes",
    "encode_state",
    "held_chunks",
    "memory_offset",
    "open_regular",
    "pack_head",
    "read_state",
    "read_table",
]

MAGIC, VERSION = b"KVMSNAP\0", 2
HEAD = struct.Struct("<8sIIQQIII")
TABLE_ENTRY = struct.Struct(f"<{CHUNK_PAGES // 8}sI")
#: Maximum size of a state, fw_cfg files included; the same for writing and reading.
MAX_STATE_BYTES = 64 << 20
#: Maximum ratio of a VM's memory to the host's: the rest is evicted or never touched.
_MAX_OVERCOMMIT = 8

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Status = Annotated[int, msgspec.Meta(ge=0, le=255)]
_Field = int | str


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything but memory.

    :ivar limit_pages: resident limit that the pager held; 0: none
    :ivar ended: vCPUs that have finished; ``statuses`` is what they reported, by index
    :ivar doorbells: by vCPU
    :ivar serial: registers and waiting input; ``devices`` the same, by name
    """

    kind: typing.Literal["tiny", "pc"]
    image: str
    mem_bytes: _Count
    limit_pages: _Count
    n_vcpus: Annotated[int, msgspec.Meta(ge=1)]
    params: dict[str, int]
    append: str
    fw_cfg: dict[str, bytes]
    ended: list[_Count]
    statuses: dict[_Count, _Status]
    doorbells: list[_Count]
    vcpus: list[SavedVcpu]
    board: BoardState | None
    serial: dict[str, _Field]
    devices: dict[str, dict[str, _Field]]

    @property
    def regions(self) -> list[tuple[int, int]]:
        """``(gpa, n_bytes)`` of each memory region.

        :raises LayoutError: if no VM has memory of that size
        """
        layout = PcLayout(self.mem_bytes) if self.kind == "pc" else TinyLayout(self.mem_bytes)
        return list(layout.regions)


def check_mem_bytes(mem_bytes: int) -> None:
    """Refuse a VM that is too large for this host.

    :raises LayoutError: states the maximum size
    """
    limit = _MAX_OVERCOMMIT * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if mem_bytes > limit:
        raise LayoutError(
            f"{mem_bytes} bytes of guest memory: snapshots are for VMs of up to {limit}, "
            f"{_MAX_OVERCOMMIT} times this host's memory"
        )


# -- writing --------------------------------------------------------------------


def encode_state(state: State) -> bytes:
    """Return a state as JSON.

    :raises LayoutError: if it is longer than :func:`read_state` accepts
    """
    check_mem_bytes(state.mem_bytes)
    raw = msgspec.json.encode(state)
    if len(raw) > MAX_STATE_BYTES:
        raise LayoutError(
            f"a state of {len(raw)} bytes, fw_cfg files included: a snapshot takes up to "
            f"{MAX_STATE_BYTES}"
        )
    return raw


def pack_head(state: bytes, n_pages: int, table: bytes) -> bytes:
    """Return the first bytes of a file, up to the state."""
    fields = struct.pack("<QQIII", len(state), n_pages, crc32c(state), crc32c(table), 0)
    return struct.pack("<8sII", MAGIC, VERSION, crc32c(fields)) + fields


def memory_offset(state_bytes: int) -> int:
    """Return the file offset of memory."""
    return -(-(HEAD.size + state_bytes) // PAGE_BYTES) * PAGE_BYTES


# -- reading --------------------------------------------------------------------


def open_regular(path: Path) -> int:
    """Open a file for reading, without waiting for the other end of a FIFO.

    :raises ImageError: if it is not a regular file
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(str(path), "file", "not a regular file")
    return fd


def read_state(name: str, fd: int) -> tuple[State, int, int, int]:
    """Read head and state, and check all that needs no memory.

    :return: the state, the bytes that it took, pages of memory, CRC-32C of the table
    :raises ImageError: names the field
    """
    head = os.pread(fd, HEAD.size, 0)
    if len(head) < HEAD.size:
        raise ImageError(name, "snapshot head", f"truncated after {len(head)} bytes", len(head))
    magic, version, head_crc, n_bytes, n_pages, state_crc, table_crc, zero = HEAD.unpack(head)
    if magic != MAGIC:
        raise ImageError(name, "magic", "not a snapshot", 0)
    if version != VERSION:
        raise ImageError(name, "version", f"{version}, this program reads {VERSION}", 8)
    if crc32c(head[16:]) != head_crc or zero:
        raise ImageError(name, "snapshot head", "damaged: its checksum is another", 12)
    size = os.fstat(fd).st_size
    if n_bytes > min(size, MAX_STATE_BYTES):
        problem = f"{n_bytes} bytes; the file has {size}, a snapshot takes {MAX_STATE_BYTES}"
        raise ImageError(name, "state size", problem, 16)
    raw = os.pread(fd, n_bytes, HEAD.size)
    if len(raw) < n_bytes or crc32c(raw) != state_crc:
        raise ImageError(name, "state", "damaged: its checksum is another", HEAD.size)
    state = _decode(name, raw)
    _check_state(name, state)
    wanted = memory_offset(n_bytes) + n_pages * PAGE_BYTES
    wanted += sum(1 for _ in chunk_ranges(state.regions)) * TABLE_ENTRY.size
    if size != wanted:
        raise ImageError(name, "file", f"{size} bytes, its head and state make {wanted}", size)
    return state, n_bytes, n_pages, table_crc


def _decode(name: str, raw: bytes) -> State:
    try:
        return msgspec.json.decode(raw, type=State)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(name, "state", str(error), HEAD.size) from error


def _check_state(name: str, state: State) -> None:
    try:
        check_mem_bytes(state.mem_bytes)
        assert state.regions
    except LayoutError as error:
        raise ImageError(name, "mem_bytes", str(error)) from error
    lengths = {len(state.vcpus), len(state.doorbells), state.n_vcpus}
    if len(lengths) > 1:
        problem = f"{state.n_vcpus}, states of {len(state.vcpus)}, doorbells of "
        raise ImageError(name, "n_vcpus", problem + str(len(state.doorbells)))
    for field, indexes in (("ended", state.ended), ("statuses", list(state.statuses))):
        if len(set(indexes)) < len(indexes) or max(indexes, default=0) >= state.n_vcpus:
            problem = f"not vCPUs of {state.n_vcpus}, each once: {indexes[:8]}"
            raise ImageError(name, field, problem)
    if (state.board is None) != (state.kind == "tiny"):
        raise ImageError(name, "board", f"a machine {state.kind} with or without it")


def read_table(
    name: str, fd: int, state: State, first: int, n_pages: int, table_crc: int
) -> list[tuple[ChunkRange, bytes, int]]:
    """Read the table of memory: chunk, bitmap of the pages in the file, CRC-32C of these.

    :param first: file offset of memory
    :raises ImageError: names the chunk
    """
    where = list(chunk_ranges(state.regions))
    offset = first + n_pages * PAGE_BYTES
    raw = os.pread(fd, len(where) * TABLE_ENTRY.size, offset)
    if len(raw) < len(where) * TABLE_ENTRY.size or crc32c(raw) != table_crc:
        raise ImageError(name, "table", "damaged: its checksum is another", offset)
    table = [
        (chunk, held, crc)
        for chunk, (held, crc) in zip(where, TABLE_ENTRY.iter_unpack(raw), strict=True)
    ]
    total = 0
    for chunk, held, _ in table:
        bits = int.from_bytes(held, "little")
        if bits >> chunk.n_pages:
            raise ImageError(name, f"table, gfn {chunk.gfn:#x}", "pages outside of memory")
        total += bits.bit_count()
    if total != n_pages:
        raise ImageError(name, "table", f"{total} pages of memory, the file has {n_pages}", 24)
    return table


def held_chunks(
    table: list[tuple[ChunkRange, bytes, int]],
) -> Iterator[tuple[ChunkRange, bytes, int, int]]:
    """Yield the chunks with pages in the file: chunk, bitmap, CRC-32C, pages."""
    for chunk, held, crc in table:
        count = int.from_bytes(held, "little").bit_count()
        if count:
            yield chunk, held, crc, count
