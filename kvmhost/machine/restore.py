"""Creates a VM from a snapshot file; :mod:`.snapfile` has the format, :mod:`.snapshot` writes it.

Files are untrusted: damaged or inconsistent data, or state that KVM refuses, raises an
:class:`~kvmhost.errors.ImageError`, and no guest code runs. State that this host accepts but
does not preserve is logged. The guest's clocks do not advance in between, where the host
allows their counters to be set; the wall clock (CMOS) is the host's.
"""

from __future__ import annotations

import logging
import os
import struct
import typing
from pathlib import Path
from typing import Any

from kvmhost.boot.image import Image, Segment
from kvmhost.boot.pcboot import BootPlan, BootRequest, Chunk, Mode, PcEntry
from kvmhost.errors import ImageError, IoctlError, KvmHostError, LayoutError
from kvmhost.kvm.msrs import MsrReport
from kvmhost.machine import snapfile
from kvmhost.machine.base import BaseMachine
from kvmhost.machine.chunks import (
    CHUNK_BYTES,
    ChunkRange,
    ChunkWriter,
    crc32c,
)
from kvmhost.machine.pc import PcMachine, PcOptions
from kvmhost.machine.snapfile import State
from kvmhost.machine.snapshot import snapshot_engine
from kvmhost.machine.tiny import Machine
from kvmhost.machine.vcpustate import load_board, load_vcpu
from kvmhost.memory.layout import IMAGE_GPA
from kvmhost.units import PAGE_BYTES

if typing.TYPE_CHECKING:
    pass

__all__ = ["restore_machine"]

log = logging.getLogger("kvmhost.snapshot")


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
    engine = snapshot_engine(machine.engine)
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
