"""From ``struct kh_exit``, the C core's decoded ``struct kvm_run``, to typed exits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmhost._ffi import ffi, lib
from kvmhost.exits import (
    BusLock,
    Debug,
    Exit,
    FailEntry,
    Hlt,
    Hypercall,
    InternalError,
    IoapicEoi,
    IoIn,
    IoOut,
    IrqWindow,
    Kicked,
    MemoryFault,
    MmioRead,
    MmioWrite,
    MsrRead,
    MsrWrite,
    SetTpr,
    Shutdown,
    SystemEvent,
    TprAccess,
    UnknownExit,
)

__all__ = ["Exit", "Kicked", "decode"]


def decode(raw: Any) -> Exit:
    """Turn ``struct kh_exit`` into an :class:`~kvmhost.exits.Exit`.

    A reason without a type of its own becomes
    :class:`~kvmhost.exits.UnknownExit`; nothing raises here.
    """
    build = _DECODERS.get(raw.reason)
    return build(raw) if build else UnknownExit(raw.reason, raw.detail)


def _io(raw: Any) -> Exit:
    if not raw.is_write:
        return IoIn(raw.port, raw.size, raw.count)
    n_bytes = min(raw.size * raw.count, lib.KH_IO_DATA)
    return IoOut(raw.port, raw.size, ffi.buffer(raw.data, n_bytes)[:], raw.count)


def _mmio(raw: Any) -> Exit:
    if raw.is_write:
        return MmioWrite(raw.address, ffi.buffer(raw.data, raw.size)[:])
    return MmioRead(raw.address, raw.size)


def _memory_fault(raw: Any) -> Exit:
    if not raw.n_internal:
        return MemoryFault()
    return MemoryFault(gpa=raw.address, size=raw.internal[0], flags=raw.detail)


def _words(raw: Any) -> tuple[int, ...]:
    return tuple(raw.internal[i] for i in range(raw.n_internal))


_DECODERS: dict[int, Callable[[Any], Exit]] = {
    lib.KVM_EXIT_IO: _io,
    lib.KVM_EXIT_MMIO: _mmio,
    lib.KVM_EXIT_HLT: lambda raw: Hlt(),
    lib.KVM_EXIT_SHUTDOWN: lambda raw: Shutdown(),
    lib.KVM_EXIT_INTR: lambda raw: Kicked(),
    lib.KVM_EXIT_FAIL_ENTRY: lambda raw: FailEntry(raw.detail),
    lib.KVM_EXIT_INTERNAL_ERROR: lambda raw: InternalError(raw.detail, _words(raw)),
    lib.KVM_EXIT_MEMORY_FAULT: _memory_fault,
    lib.KVM_EXIT_DEBUG: lambda raw: Debug(
        raw.detail, raw.address, raw.internal[0], raw.internal[1]
    ),
    lib.KVM_EXIT_HYPERCALL: lambda raw: Hypercall(raw.detail, _words(raw), bool(raw.is_write)),
    lib.KVM_EXIT_X86_RDMSR: lambda raw: MsrRead(raw.address, raw.detail),
    lib.KVM_EXIT_X86_WRMSR: lambda raw: MsrWrite(raw.address, raw.internal[0], raw.detail),
    lib.KVM_EXIT_SYSTEM_EVENT: lambda raw: SystemEvent(raw.detail, _words(raw)),
    lib.KVM_EXIT_IOAPIC_EOI: lambda raw: IoapicEoi(raw.detail),
    lib.KVM_EXIT_IRQ_WINDOW_OPEN: lambda raw: IrqWindow(),
    lib.KVM_EXIT_SET_TPR: lambda raw: SetTpr(),
    lib.KVM_EXIT_TPR_ACCESS: lambda raw: TprAccess(raw.address, bool(raw.is_write)),
    lib.KVM_EXIT_X86_BUS_LOCK: lambda raw: BusLock(),
}
