"""Saves a VM to a snapshot file and restores it; :mod:`.snapfile` has the format.

A snapshot is consistent. The vCPUs are paused, their pending accesses are completed, and the
pager is frozen: then the state is read, then memory, resident pages from the memfds and
evicted ones from the store, without restoring a page. The file gets its name when it is
complete; a failure before that leaves no file, and the VM keeps running.

Files are untrusted: damaged or inconsistent data, or state that KVM refuses, raises an
:class:`~kvmhost.errors.ImageError`, and no guest code runs. State that this host accepts but
does not preserve is logged. The guest's clocks do not advance in between, where the host
allows their counters to be set; the wall clock (CMOS) is the host's.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import logging
import os
import struct
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvmhost._ffi import check, lib
from kvmhost.boot.image import Image, Segment
from kvmhost.boot.pcboot import BootPlan, BootRequest, Chunk, Mode, PcEntry
from kvmhost.engine.kvm import KvmEngine
from kvmhost.errors import CapabilityError, ImageError, IoctlError, KvmHostError, LayoutError
from kvmhost.files import NamelessFile, os_errors
from kvmhost.kvm.msrs import MsrReport, readable_msrs
from kvmhost.machine import snapfile
from kvmhost.machine.base import BaseMachine
from kvmhost.machine.chunks import (
    CHUNK_BYTES,
    ChunkRange,
    ChunkReader,
    ChunkWriter,
    chunk_ranges,
    crc32c,
)
from kvmhost.machine.pc import PcMachine, PcOptions
from kvmhost.machine.snapfile import TABLE_ENTRY, State
from kvmhost.machine.tiny import Machine
from kvmhost.machine.vcpustate import load_board, load_vcpu, save_board, save_vcpu
from kvmhost.memory.layout import IMAGE_GPA
from kvmhost.units import PAGE_BYTES

if typing.TYPE_CHECKING:
    from kvmhost.pager.pager import Pager

__all__ = ["restore_machine", "save_machine"]

#: Memory is written in pieces of about this size; three are in memory at a time.
_PIECE_BYTES = 4 << 20
#: Maximum number of dirty bytes of the file, which bounds its use of the page cache.
_BEHIND_BYTES, _BEHIND_STEP_BYTES = 64 << 20, 16 << 20

log = logging.getLogger("kvmhost.snapshot")


def save_machine(
    machine: BaseMachine,
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
    engine = _kvm_engine(machine)
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
                machine.stop()
    return n_pages * PAGE_BYTES


def restore_machine(
    path: Path, *, resident_max_bytes: int | None = None, **common: Any
) -> BaseMachine:
    """Create a machine from a snapshot; it is not started yet.

    :param resident_max_bytes: resident limit, enforced from the first page on: pages above it
        go to the store. None: that of the snapshot, if it had one; 0: none
    :param common: as for :class:`~kvmhost.machine.base.BaseMachine`, except the values in the file
    :raises ImageError: if the file is damaged, of another version, or refused by KVM
    :raises CapabilityError: if there is a limit and no userfaultfd to enforce it
    """
    name = str(path)
    try:
        fd = snapfile.open_regular(path)
        try:
            return _restore(name, fd, resident_max_bytes, common)
        finally:
            os.close(fd)
    except OSError as error:
        if isinstance(error, KvmHostError):
            raise
        raise ImageError(name, "file", error.strerror or str(error)) from error


# -- writing --------------------------------------------------------------------


def _kvm_engine(machine: BaseMachine) -> KvmEngine:
    if not isinstance(machine.engine, KvmEngine):
        raise CapabilityError(
            "snapshot", "the kvm engine", f"engine {machine.engine.name}", "use --engine kvm"
        )
    return machine.engine


def _pager(machine: BaseMachine) -> Pager | None:
    """Return the pager, opened so that no other thread opens it; None if it cannot be opened."""
    try:
        return machine.open_pager()
    except CapabilityError:
        return None


def _msrs(machine: BaseMachine, engine: KvmEngine) -> list[int]:
    """Return the readable MSRs; the guest is stopped only for one call."""
    with machine.stopped_vcpus():
        cpuid = bytes(engine.cores[0].get_cpuid())
    return readable_msrs(cpuid, isinstance(machine, PcMachine))


def _kind(machine: BaseMachine) -> typing.Literal["tiny", "pc"]:
    if isinstance(machine, PcMachine):
        return "pc"
    if isinstance(machine, Machine):
        return "tiny"
    raise CapabilityError(
        "snapshot", "a tiny guest or a pc", f"machine {machine.kind}", "boot it anew"
    )


def _state(machine: BaseMachine, engine: KvmEngine, limit_pages: int, msrs: list[int]) -> State:
    pc = machine if isinstance(machine, PcMachine) else None
    options = pc.options if pc else PcOptions()
    return State(
        kind=_kind(machine),
        image=machine.image.path,
        mem_bytes=machine.layout.mem_bytes,
        limit_pages=limit_pages,
        n_vcpus=machine.n_vcpus,
        params=dict(machine.params),
        append=options.append,
        fw_cfg=dict(options.fw_cfg),
        ended=sorted(machine.ended_vcpus),
        statuses=machine.statuses,
        doorbells=[vcpu.doorbells for vcpu in machine.vcpus],
        vcpus=[save_vcpu(core, msrs, pc is not None) for core in engine.cores],
        board=save_board(engine.vm) if pc else None,
        serial=machine.serial.save(),
        devices={name: device.save() for name, device in pc.devices.items()} if pc else {},
    )


def _write(
    fd: int,
    machine: BaseMachine,
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


# -- reading --------------------------------------------------------------------


def _restore(
    name: str, fd: int, resident_max_bytes: int | None, common: dict[str, Any]
) -> BaseMachine:
    state, state_bytes, n_pages, table_crc = snapfile.read_state(name, fd)
    first = snapfile.memory_offset(state_bytes)
    table = snapfile.read_table(name, fd, state, first, n_pages, table_crc)
    machine = _empty_machine(name, state, common)
    try:
        limit = resident_max_bytes
        if limit is None:
            limit = state.limit_pages * PAGE_BYTES
        _fill_memory(name, machine, fd, first, table, limit)
        _fill_state(name, machine, state)
    except BaseException:
        machine.close()
        raise
    return machine


class _Nothing:
    """An image that loads nothing: memory comes from the snapshot."""

    loader = "snapshot"
    remarks: tuple[str, ...] = ()

    def __init__(self, path: str) -> None:
        self.path = path

    def plan(self, request: BootRequest) -> BootPlan:
        """Return an empty plan."""
        chunks: tuple[Chunk, ...] = ()
        return BootPlan(self.path, chunks, PcEntry(Mode.PROTECTED, 0))


def _empty_machine(name: str, state: State, common: dict[str, Any]) -> BaseMachine:
    common = common | {"mem_bytes": state.mem_bytes, "n_vcpus": state.n_vcpus, "engine": "kvm"}
    try:
        if state.kind == "pc":
            options = PcOptions(state.append, (), state.fw_cfg)
            return PcMachine(_Nothing(state.image), options, **common)
        image = Image(state.image, IMAGE_GPA, (Segment(IMAGE_GPA, b"", 0, 0),), ())
        machine = Machine(image, **common)
        machine.params = dict(state.params)
        return machine
    except (LayoutError, ValueError) as error:
        raise ImageError(name, "state", str(error)) from error


def _fill_memory(
    name: str,
    machine: BaseMachine,
    fd: int,
    offset: int,
    table: list[tuple[ChunkRange, bytes, int]],
    resident_max_bytes: int,
) -> None:
    machine.memory.punch_all()
    pager, n_pinned = None, 0
    if resident_max_bytes:
        pager = machine.open_pager()
        pager.set_limit(resident_max_bytes)
        n_pinned = sum(-(-n_bytes // PAGE_BYTES) for _, n_bytes in machine.layout.pinned_ranges)
    writer = ChunkWriter(machine.memory, pager, n_pinned)
    room = memoryview(bytearray(CHUNK_BYTES))
    for chunk, held, crc, count in snapfile.held_chunks(table):
        data = room[: count * PAGE_BYTES]
        where = f"memory, gfn {chunk.gfn:#x} on"
        if os.preadv(fd, [data], offset) != len(data) or crc32c(data) != crc:
            raise ImageError(name, where, "damaged: its checksum is another", offset)
        try:
            writer.fill(chunk, held, data)
        except LayoutError as error:
            raise ImageError(name, where, str(error), offset) from error
        offset += len(data)


def _fill_state(name: str, machine: BaseMachine, state: State) -> None:
    engine = _kvm_engine(machine)
    pc = machine if isinstance(machine, PcMachine) else None
    try:
        if pc and state.board:
            load_board(engine.vm, state.board)
            for device_name, device in pc.devices.items():
                device.load(state.devices[device_name])
        machine.serial.load(state.serial)
        for index, (core, vcpu) in enumerate(zip(engine.cores, state.vcpus, strict=True)):
            report, remarks = load_vcpu(core, vcpu, pc is not None)
            _judge_msrs(name, index, report, vcpu.tsc_khz)
            for remark in remarks:
                log.warning("%s: vCPU %d: %s", name, index, remark)
        machine.adopt(set(state.ended), state.statuses, state.doorbells)
    except IoctlError as error:
        raise ImageError(name, "state", f"KVM refuses it: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
        if isinstance(error, KvmHostError):
            raise
        raise ImageError(name, "state", f"damaged: {type(error).__name__} {error}") from error


def _judge_msrs(name: str, index: int, report: MsrReport, tsc_khz: int) -> None:
    """Raise for state that KVM refuses, and log state that it does not preserve."""
    if report.refused:
        refused = ", ".join(f"{msr:#x}" for msr in report.refused)
        raise ImageError(name, f"vcpus[{index}].msrs", f"this KVM refuses MSR {refused}")
    if report.tsc_ahead and index == 0:
        seconds = report.tsc_ahead / (tsc_khz * 1000) if tsc_khz else 0.0
        log.warning(
            "%s: this host's KVM takes a TSC (MSR 0x10) and ignores it: the guest's TSC runs "
            "on, %d cycles (%.1f s) ahead of the snapshot",
            name,
            report.tsc_ahead,
            seconds,
        )
    for msr, (wanted, found) in report.ignored.items():
        log.warning(
            "%s: vCPU %d: this host's KVM takes MSR %#x and ignores it: it is %#x, not %#x",
            name,
            index,
            msr,
            found,
            wanted,
        )
    if report.absent and index == 0:
        absent = ", ".join(f"{msr:#x}" for msr in report.absent)
        log.warning("%s: this host's KVM does not have MSR %s, which was 0", name, absent)
