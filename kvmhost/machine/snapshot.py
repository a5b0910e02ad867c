"""Snapshots: a whole VM in a file, and back.

The file, little-endian::

    0   8 bytes  magic "KVMSNAP\\0"
    8   u32      version, 1
    12  u32      CRC-32 of the header
    16  u64      bytes of the header
    24           header, JSON: see :class:`Header`
    ...          zeros up to a multiple of 4096
    ...          memory: the pages that are not zero, run by run, as the header lists them

Memory runs carry a CRC-32 each. A file is untrusted: what is damaged, contradictory or
refused by KVM ends in an :class:`~kvmhost.errors.ImageError`, and no guest code runs.
The guest's clocks stand still in between; the wall clock (CMOS) is the host's.
"""

from __future__ import annotations

import os
import struct
import tempfile
import typing
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from kvmhost.boot.image import Image, Segment
from kvmhost.boot.pcboot import BootPlan, BootRequest, Chunk, Mode, PcEntry
from kvmhost.engine.kvm import KvmEngine
from kvmhost.errors import CapabilityError, ImageError, IoctlError, KvmHostError, LayoutError
from kvmhost.machine.base import BaseMachine
from kvmhost.machine.pc import PcMachine, PcOptions
from kvmhost.machine.tiny import Machine
from kvmhost.machine.vcpustate import load_board, load_vcpu, save_board, save_vcpu
from kvmhost.memory.guest import GuestMemory
from kvmhost.memory.layout import IMAGE_GPA, PAGE_BYTES

__all__ = ["VERSION", "restore_machine", "save_machine"]

MAGIC, VERSION = b"KVMSNAP\0", 1
_HEAD = struct.Struct("<8sIIQ")
_MAX_HEADER_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
_ZERO_PAGE = bytes(PAGE_BYTES)


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A run of memory in the file."""

    gpa: int
    n_bytes: int
    offset: int
    crc: int


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything but memory.

    ``ended`` are vCPUs that have finished, ``statuses`` what they reported by index;
    ``counters`` are doorbells by vCPU.
    """

    kind: typing.Literal["tiny", "pc"]
    image: str
    mem_bytes: int
    n_vcpus: int
    params: dict[str, int]
    append: str
    fw_cfg: dict[str, str]
    ended: list[int]
    statuses: dict[str, int]
    doorbells: list[int]
    vcpus: list[dict[str, Any]]
    board: dict[str, Any]
    serial: dict[str, Any]
    devices: dict[str, dict[str, Any]]
    runs: list[Run]


def save_machine(machine: BaseMachine, path: Path) -> int:
    """Write a snapshot; the machine is paused meanwhile and goes on after it.

    The file appears whole or not at all.

    :return: bytes of memory in it
    :raises CapabilityError: if the machine does not run on KVM
    :raises LayoutError: if the file cannot be written
    """
    engine = _kvm_engine(machine)
    machine.pause()
    try:
        machine.settle()
        if machine.has_pager:
            machine.open_pager().restore(0, machine.memory.gfn_end)
        header = _header(machine, engine)
        _write(path, header, machine.memory)
    finally:
        machine.resume()
    return sum(run.n_bytes for run in header.runs)


def restore_machine(path: Path, **common: Any) -> BaseMachine:
    """Make a machine out of a snapshot; it is not started yet.

    :param common: as for :class:`~kvmhost.machine.base.BaseMachine`, without what the file says
    :raises ImageError: if the file is damaged, of another version, or refused by KVM
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(name, file, size)
            _check_runs(name, header, size)
            machine = _empty_machine(name, header, common)
            try:
                _fill(name, machine, header, file)
            except BaseException:
                machine.close()
                raise
    except OSError as error:
        if isinstance(error, KvmHostError):
            raise
        raise ImageError(name, "file", error.strerror or str(error)) from error
    return machine


# -- writing --------------------------------------------------------------------


def _kvm_engine(machine: BaseMachine) -> KvmEngine:
    if not isinstance(machine.engine, KvmEngine):
        raise CapabilityError(
            "snapshot", "the kvm engine", f"engine {machine.engine.name}", "use --engine kvm"
        )
    return machine.engine


def _kind(machine: BaseMachine) -> typing.Literal["tiny", "pc"]:
    if isinstance(machine, PcMachine):
        return "pc"
    if isinstance(machine, Machine):
        return "tiny"
    raise CapabilityError(
        "snapshot", "a tiny guest or a pc", f"machine {machine.kind}", "boot it anew"
    )


def _header(machine: BaseMachine, engine: KvmEngine) -> Header:
    pc = machine if isinstance(machine, PcMachine) else None
    options = pc.options if pc else PcOptions()
    msrs = engine.msr_indices()
    return Header(
        kind=_kind(machine),
        image=machine.image.path,
        mem_bytes=machine.layout.mem_bytes,
        n_vcpus=machine.n_vcpus,
        params=dict(machine.params),
        append=options.append,
        fw_cfg={name: data.hex() for name, data in options.fw_cfg.items()},
        ended=sorted(machine.ended_vcpus),
        statuses={str(index): status for index, status in machine.statuses.items()},
        doorbells=[vcpu.doorbells for vcpu in machine.vcpus],
        vcpus=[save_vcpu(core, msrs, pc is not None) for core in engine.cores],
        board=save_board(engine.vm) if pc else {},
        serial=machine.serial.save(),
        devices={name: device.save() for name, device in pc.devices.items()} if pc else {},
        runs=list(_runs(machine.memory)),
    )


def _runs(memory: GuestMemory) -> Iterator[Run]:
    """Yield the runs of pages that are not zero; offsets count from the first of them."""
    at = 0
    for region in memory.regions:
        for start, data in _held(region.memfd, region.n_bytes):
            for first, end in _not_zero(data):
                yield Run(region.gpa + start + first, end - first, at, zlib.crc32(data[first:end]))
                at += end - first


def _held(fd: int, n_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield what a memfd holds, in chunks: offset and bytes."""
    end = 0
    while end < n_bytes:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:
            return  # Only holes from here on.
        end = os.lseek(fd, start, os.SEEK_HOLE)
        for at in range(start, end, _CHUNK_BYTES):
            yield at, os.pread(fd, min(_CHUNK_BYTES, end - at), at)


def _not_zero(data: bytes) -> Iterator[tuple[int, int]]:
    first = -1
    for at in range(0, len(data), PAGE_BYTES):
        is_zero = data[at : at + PAGE_BYTES] == _ZERO_PAGE
        if not is_zero and first < 0:
            first = at
        elif is_zero and first >= 0:
            yield first, at
            first = -1
    if first >= 0:
        yield first, len(data)


def _write(path: Path, header: Header, memory: GuestMemory) -> None:
    raw = msgspec.json.encode(header)
    head = _HEAD.pack(MAGIC, VERSION, zlib.crc32(raw), len(raw))
    try:
        fd, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise LayoutError(f"{path}: {error.strerror}") from error
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(head + raw + bytes(-(len(head) + len(raw)) % PAGE_BYTES))
            for run in header.runs:
                file.write(memory[run.gpa : run.gpa + run.n_bytes])
            file.flush()
            os.fsync(fd)
        Path(partial).replace(path)
    except OSError as error:
        Path(partial).unlink(missing_ok=True)
        raise LayoutError(f"{path}: {error.strerror}") from error
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


# -- reading --------------------------------------------------------------------


def _read_header(name: str, file: typing.BinaryIO, size: int) -> Header:
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise ImageError(name, "snapshot head", f"truncated after {len(head)} bytes", len(head))
    magic, version, crc, n_bytes = _HEAD.unpack(head)
    if magic != MAGIC:
        raise ImageError(name, "magic", "not a snapshot", 0)
    if version != VERSION:
        raise ImageError(name, "version", f"{version}, this program reads {VERSION}", 8)
    if n_bytes > min(size, _MAX_HEADER_BYTES):
        raise ImageError(name, "header size", f"{n_bytes} bytes, the file has {size}", 16)
    raw = file.read(n_bytes)
    if len(raw) < n_bytes or zlib.crc32(raw) != crc:
        raise ImageError(name, "header", "damaged: its checksum is another", _HEAD.size)
    try:
        return msgspec.json.decode(raw, type=Header)
    except msgspec.DecodeError as error:
        raise ImageError(name, "header", str(error), _HEAD.size) from error


def _data_offset(header_bytes: int) -> int:
    return -(-(_HEAD.size + header_bytes) // PAGE_BYTES) * PAGE_BYTES


def _check_runs(name: str, header: Header, size: int) -> None:
    total = 0
    last_end = 0
    for i, run in enumerate(header.runs):
        whole = run.gpa % PAGE_BYTES == run.n_bytes % PAGE_BYTES == 0 < run.n_bytes
        if not whole or run.gpa < last_end or run.offset != total:
            raise ImageError(name, f"runs[{i}]", "not aligned, not ascending, or out of place")
        last_end, total = run.gpa + run.n_bytes, total + run.n_bytes
    if total > size:
        raise ImageError(name, "runs", f"{total} bytes of memory, the file has {size}", size)
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if header.mem_bytes > host_bytes:
        problem = f"{header.mem_bytes} is more than this host has ({host_bytes})"
        raise ImageError(name, "mem_bytes", problem)
    lengths = {len(header.vcpus), len(header.doorbells), header.n_vcpus}
    if len(lengths) > 1:
        raise ImageError(name, "n_vcpus", f"{header.n_vcpus}, states of {len(header.vcpus)}")


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


def _empty_machine(name: str, header: Header, common: dict[str, Any]) -> BaseMachine:
    common = common | {"mem_bytes": header.mem_bytes, "n_vcpus": header.n_vcpus, "engine": "kvm"}
    try:
        if header.kind == "pc":
            files = {file: bytes.fromhex(text) for file, text in header.fw_cfg.items()}
            options = PcOptions(header.append, (), files)
            return PcMachine(_Nothing(header.image), options, **common)
        image = Image(header.image, IMAGE_GPA, (Segment(IMAGE_GPA, b"", 0, 0),), ())
        return Machine(image, **common)
    except (LayoutError, ValueError) as error:
        raise ImageError(name, "header", str(error)) from error


def _fill(name: str, machine: BaseMachine, header: Header, file: typing.BinaryIO) -> None:
    file.seek(0)
    (n_bytes,) = struct.unpack("<Q", file.read(_HEAD.size)[-8:])
    _fill_memory(name, machine.memory, header, file, _data_offset(n_bytes))
    engine = _kvm_engine(machine)
    pc = machine if isinstance(machine, PcMachine) else None
    try:
        if pc:
            load_board(engine.vm, header.board)
            for device_name, device in pc.devices.items():
                device.load(header.devices[device_name])
        machine.serial.load(header.serial)
        for core, state in zip(engine.cores, header.vcpus, strict=True):
            refused = load_vcpu(core, state, pc is not None)
            if refused:
                raise ImageError(name, "msrs", f"this KVM refuses MSR {', '.join(refused)}")
        statuses = {int(index): status for index, status in header.statuses.items()}
    except IoctlError as error:
        raise ImageError(name, "state", f"KVM refuses it: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
        if isinstance(error, KvmHostError):
            raise
        raise ImageError(name, "state", f"damaged: {type(error).__name__} {error}") from error
    machine.adopt(set(header.ended), statuses, header.doorbells)


def _fill_memory(
    name: str, memory: GuestMemory, header: Header, file: typing.BinaryIO, first: int
) -> None:
    memory.punch_all()
    for i, run in enumerate(header.runs):
        file.seek(first + run.offset)
        data = file.read(run.n_bytes)
        if len(data) < run.n_bytes or zlib.crc32(data) != run.crc:
            where = first + run.offset
            raise ImageError(name, f"runs[{i}]", "damaged: its checksum is another", where)
        try:
            memory[run.gpa : run.gpa + run.n_bytes] = data
        except LayoutError as error:
            raise ImageError(name, f"runs[{i}]", str(error), first + run.offset) from error
