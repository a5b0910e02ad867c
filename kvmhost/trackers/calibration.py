"""Determines by experiment what makes a cleared accessed bit set again.

Runs once per process and engine. A guest of 11 instructions touches a few pages, the bits
are cleared, and it touches the pages again:

- the bits are set again: hardware walks the tables, and no re-arming is needed;
- they are set after the guest mapping was zapped: KVM shadows the tables, or has to drop
  its translations;
- neither: the accessed bits of the guest's tables cannot be used on this host.

Module parameters are not read: no single parameter distinguishes nested, shadowing and
emulated configurations.
"""

from __future__ import annotations

import struct

from kvmhost import engine as engines
from kvmhost.boot.image import Image, Segment
from kvmhost.boot.longmode import entry_state
from kvmhost.boot.tiny import load_tiny
from kvmhost.devices.bus import DOORBELL_PORT, Bus
from kvmhost.engine.base import Engine, RearmKind, Vcpu
from kvmhost.errors import CapabilityError, UnexpectedExit
from kvmhost.exits import IoOut, Kicked
from kvmhost.memory.guest import GuestMemory, Region
from kvmhost.memory.layout import IMAGE_GPA, TinyLayout
from kvmhost.mmu.tdp import LiveTable
from kvmhost.units import PAGE_BYTES, PAGE_SHIFT

__all__ = ["calibrated_rearm"]

_PAGES = 32
_START_GFN = 0x180
_MEM_BYTES = 4 << 20
_CODE = b"".join(
    (
        b"\xbf" + struct.pack("<I", _START_GFN << PAGE_SHIFT),  # 1: mov  edi, first page
        b"\xb9" + struct.pack("<I", _PAGES),  #                     mov  ecx, pages
        b"\x8a\x07",  #                                          2: mov  al, [rdi]
        b"\x48\x81\xc7" + struct.pack("<I", PAGE_BYTES),  #         add  rdi, 4096
        b"\xff\xc9",  #                                             dec  ecx
        b"\x75\xf3",  #                                             jnz  2b
        b"\xba" + struct.pack("<I", DOORBELL_PORT),  #              mov  edx, doorbell
        b"\xef",  #                                                 out  dx, eax
        b"\xeb\xe1",  #                                             jmp  1b
    )
)
_found: dict[str, RearmKind] = {}


def calibrated_rearm(engine: Engine) -> RearmKind:
    """Return how to re-arm under an engine of this kind.

    :raises CapabilityError: if no method makes accessed bits set again
    """
    if engine.fixed_rearm is not None:
        return engine.fixed_rearm
    if engine.name not in _found:
        _found[engine.name] = _calibrate(engine.name)
    return _found[engine.name]


def _calibrate(name: str) -> RearmKind:
    layout = TinyLayout(_MEM_BYTES)
    image = Image("calibration", IMAGE_GPA, (Segment(IMAGE_GPA, _CODE, len(_CODE), 0),), ())
    engine = engines.choose(name)
    try:
        with GuestMemory([Region(0, _MEM_BYTES, "calibration")]) as memory:
            load_tiny(memory, layout, image, 1, {})
            bus = Bus()
            bus.add_doorbell()
            engine.attach(memory, bus)
            vcpu = engine.create_vcpu(0, entry_state(layout, image.entry, 0))
            try:
                vcpu.stop_at_doorbell(True)
                return _find_rearm(name, vcpu, memory, layout.tables_gpa)
            finally:
                vcpu.close()
                # Before memory is unmapped; closing again is harmless.
                engine.close()
    finally:
        engine.close()


def _find_rearm(engine: str, vcpu: Vcpu, memory: GuestMemory, tables_gpa: int) -> RearmKind:
    table = LiveTable.of_guest(memory, tables_gpa)
    try:
        if _young_after_touches(vcpu, table) != _PAGES:
            raise _unsupported(engine, "no accessed bits at all")
        if _young_after_touches(vcpu, table) == _PAGES:
            return RearmKind.NONE
        memory.regions[0].zap(_START_GFN, _PAGES)
        if _young_after_touches(vcpu, table) == _PAGES:
            return RearmKind.ZAP
    finally:
        table.close()
    raise _unsupported(engine, "bits that do not come back after a zap")


def _young_after_touches(vcpu: Vcpu, table: LiveTable) -> int:
    """Run the guest to its doorbell; count, and clear, what became young."""
    while isinstance(vm_exit := vcpu.run(), Kicked):
        continue
    if not (isinstance(vm_exit, IoOut) and vm_exit.port == DOORBELL_PORT):
        raise UnexpectedExit(vcpu.index, f"calibration: {vm_exit!r}")
    return table.harvest(_START_GFN, _PAGES).count()


def _unsupported(engine: str, found: str) -> CapabilityError:
    return CapabilityError(
        "tracker guestpt", "accessed bits in the guest's tables", f"engine {engine}: {found}",
        "use --tracker pagemap",
    )  # fmt: skip
