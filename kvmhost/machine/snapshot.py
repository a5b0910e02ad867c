"""Saves a VM to a snapshot file; :mod:`.snapfile` has the format, :mod:`.restore` reads it.

A snapshot is consistent. The vCPUs are paused, their pending accesses are completed, and the
pager is frozen: then the state is read, then memory, resident pages from the memfds and
evicted ones from the store, without restoring a page. The file gets its name when it is
complete; a failure before that leaves no file, and the VM keeps running.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from kvmhost._ffi import check, lib
from kvmhost.engine.kvm import KvmEngine
from kvmhost.errors import CapabilityError, KvmHostError
from kvmhost.files import NamelessFile, os_errors
from kvmhost.kvm.msrs import readable_msrs
from kvmhost.machine import snapfile
from kvmhost.machine.chunks import (
    CHUNK_BYTES,
    ChunkRange,
    ChunkReader,
    chunk_ranges,
)
from kvmhost.machine.snapfile import TABLE_ENTRY, State
from kvmhost.machine.vcpustate import save_board, save_vcpu
from kvmhost.units import PAGE_BYTES

if typing.TYPE_CHECKING:
    from kvmhost.engine.base import Engine
    from kvmhost.machine.running import RunnableMachine
    from kvmhost.pager.pager import Pager

__all__ = ["save_machine", "snapshot_engine"]

#: Memory is written in pieces of about this size; three are in memory at a time.
_PIECE_BYTES = 4 << 20
#: Maximum number of dirty bytes of the file, which bounds its use of the page cache.
_BEHIND_BYTES, _BEHIND_STEP_BYTES = 64 << 20, 16 << 20


def snapshot_engine(engine: Engine) -> KvmEngine:
    """Return the engine of a machine as the one that snapshots know.

    :raises CapabilityError: if it is another one
    """
    if not isinstance(engine, KvmEngine):
        raise CapabilityError(
            "snapshot", "the kvm engine", f"engine {engine.name}", "use --engine kvm"
        )
    return engine


def save_machine(
    machine: RunnableMachine,
    path: Path,
    *,
    cancelled: Callable[[], bool] = lambda: False,
    stop: bool = False,
) -> int:
    """Write a snapshot; the machine is paused meanwhile and then resumes.

    The file appears whole or not at all.

    :param cancelled: called between pieces of memory; if true, no file is written
    :param stop: end the guest instead of resuming it
    :return: bytes of memory in the file
    :raises CapabilityError: if the machine does not run on KVM
    :raises PauseTimeout: if a vCPU does not stop in time
    :raises HostError: if the file cannot be written
    :raises LayoutError: if something that is not a regular file has its name
    :raises PagerError: if a page is lost; names its gfn
    """
    engine = snapshot_engine(machine.engine)
    pager = _pager(machine)
    snapfile.check_mem_bytes(machine.layout.mem_bytes)
    file = NamelessFile(path)
    with contextlib.closing(file):
        msrs = _msrs(machine, engine)
        with machine.stopped_vcpus():
            machine.settle()
            with os_errors(path):
                n_pages = _write(file.fd, machine, engine, pager, msrs, cancelled)
            file.commit()
            if stop:
                machine.end_vcpus()
    return n_pages * PAGE_BYTES


def _pager(machine: RunnableMachine) -> Pager | None:
    """Return the pager, opened so that no other thread opens it; None if it cannot be opened."""
    try:
        return machine.paging.open_pager()
    except CapabilityError:
        return None


def _msrs(machine: RunnableMachine, engine: KvmEngine) -> list[int]:
    """Return the readable MSRs; the guest is stopped only for one call."""
    with machine.stopped_vcpus():
        cpuid = bytes(engine.cores[0].get_cpuid())
    return readable_msrs(cpuid, machine.kind == "pc")


def _state(machine: RunnableMachine, engine: KvmEngine, limit_pages: int, msrs: list[int]) -> State:
    parts = machine.snapshot_parts()
    is_pc = parts.kind == "pc"
    return State(
        kind=parts.kind,
        image=machine.image.path,
        mem_bytes=machine.layout.mem_bytes,
        limit_pages=limit_pages,
        n_vcpus=machine.n_vcpus,
        params=dict(machine.params),
        append=parts.append,
        fw_cfg=dict(parts.fw_cfg),
        ended=sorted(machine.ended_vcpus),
        statuses=machine.statuses,
        doorbells=[vcpu.doorbells for vcpu in machine.vcpus],
        vcpus=[save_vcpu(core, msrs, is_pc) for core in engine.cores],
        board=save_board(engine.vm) if is_pc else None,
        serial=machine.serial.save(),
        devices=dict(parts.devices),
    )


def _write(
    fd: int,
    machine: RunnableMachine,
    engine: KvmEngine,
    pager: Pager | None,
    msrs: list[int],
    cancelled: Callable[[], bool],
) -> int:
    with pager.frozen() if pager else contextlib.nullcontext() as core:
        state = _state(
            machine, engine, pager.resident_max_bytes // PAGE_BYTES if pager else 0, msrs
        )
        raw = snapfile.encode_state(state)
        reader = ChunkReader(machine.memory, core)
        first = snapfile.memory_offset(len(raw))
        table = _write_memory(fd, first, reader, list(chunk_ranges(state.regions)), cancelled)
    n_pages = sum(int.from_bytes(held, "little").bit_count() for held, _ in table)
    packed = b"".join(TABLE_ENTRY.pack(held, crc) for held, crc in table)
    _write_at(fd, packed, first + n_pages * PAGE_BYTES)
    _write_at(fd, snapfile.pack_head(raw, n_pages, packed) + raw, 0)
    return n_pages


def _write_memory(
    fd: int,
    offset: int,
    reader: ChunkReader,
    chunks: list[ChunkRange],
    cancelled: Callable[[], bool],
) -> list[tuple[bytes, int]]:
    """Write the pages of all chunks from ``offset`` on; return bitmap and CRC-32C of each.

    One piece is read while the previous one is written.
    """
    table: list[tuple[bytes, int]] = []
    pieces = [bytearray(_PIECE_BYTES) for _ in range(3)]
    under_way: collections.deque[concurrent.futures.Future[None]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(1, "snapshot", _mask_signals) as writer:
        for number, piece in enumerate(_pieces(chunks)):
            if len(under_way) == len(pieces) - 1:
                under_way.popleft().result()
            if cancelled():
                raise KvmHostError("the snapshot was cancelled; no file was written")
            room, n_bytes = memoryview(pieces[number % len(pieces)]), 0
            for chunk in piece:
                held, n_held, crc = reader.read(chunk, room[n_bytes:])
                table.append((held, crc))
                n_bytes += n_held * PAGE_BYTES
            under_way.append(writer.submit(_write_piece, fd, room[:n_bytes], offset))
            offset += n_bytes
        for write in under_way:
            write.result()
    return table


def _mask_signals() -> None:
    check(lib.kh_thread_mask_signals(), "pthread_sigmask")


def _pieces(chunks: list[ChunkRange]) -> Iterator[list[ChunkRange]]:
    step = _PIECE_BYTES // CHUNK_BYTES
    for start in range(0, len(chunks), step):
        yield chunks[start : start + step]


def _write_piece(fd: int, data: memoryview, offset: int) -> None:
    _write_at(fd, data, offset)
    start, end = (at - at % _BEHIND_STEP_BYTES for at in (offset, offset + len(data)))
    if start < end:
        check(lib.kh_write_behind(fd, start, end - start, _BEHIND_BYTES), "sync_file_range")


def _write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    left = memoryview(data)
    while left:
        done = os.pwrite(fd, left, offset)
        left, offset = left[done:], offset + done
