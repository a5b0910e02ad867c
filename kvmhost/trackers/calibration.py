"""Determines by experiment what makes a cleared accessed bit set again.

Runs once per process and engine. A guest of 11 instructions touches a few pages, the bits
are cleared, and it touches the pages again, three times each: without help, after a flush of
what the processor caches for the guest, and after a zap of the guest mapping.

==============================  ============================================  ========
the bits are set again          because                                       re-arm
==============================  ============================================  ========
without help                    hardware walks the guest's tables, and no     nothing
                                cached translation outlives an exit
after a flush                   hardware walks the tables, and cached         a zap,
                                translations outlive exits (tagged TLB)       which KVM
                                                                              flushes
after a zap only                KVM shadows the tables                        a zap
never                           the bits cannot be used on this host          none
==============================  ============================================  ========

A share of the pages counts, and not all of them: a TLB may keep or lose any of its entries.

Module parameters are not read: no single parameter distinguishes nested, shadowing and
emulated configurations.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

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
from kvmhost.vm.names import EngineName

__all__ = ["Calibration", "calibrate"]

_PAGES = 32
_TRIES = 3
#: Of the pages of each try; the rest may be translations that happened to stay or to go.
_MIN_SHARE = 0.9
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


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What an engine needs for accessed bits to be set again, and how that was found.

    :ivar walker: who walks the guest's tables, and what it caches
    :ivar evidence: how many bits came back in each experiment
    """

    rearm: RearmKind
    walker: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.walker} ({self.evidence})"


_found: dict[str, Calibration] = {}


def calibrate(engine: Engine) -> Calibration:
    """Return how to re-arm under an engine of this kind.

    :raises CapabilityError: if no method makes accessed bits set again
    """
    if engine.fixed_rearm is not None:
        return Calibration(engine.fixed_rearm, "the emulator walks the tables", "by its design")
    if engine.name not in _found:
        _found[engine.name] = _calibrate(engine.name)
    return _found[engine.name]


def _calibrate(name: EngineName) -> Calibration:
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


def _find_rearm(engine: str, vcpu: Vcpu, memory: GuestMemory, tables_gpa: int) -> Calibration:
    table = LiveTable.of_guest(memory, tables_gpa)
    experiments: dict[str, tuple[RearmKind, str, Callable[[], object]]] = {
        "without help": (RearmKind.NONE, "hardware walks the tables", lambda: None),
        "after a TLB flush": (
            RearmKind.ZAP,
            "hardware walks the tables, and its TLB keeps translations over exits",
            vcpu.flush_guest_tlb,
        ),
        "after a zap": (
            RearmKind.ZAP,
            "KVM shadows the tables",
            lambda: memory.regions[0].zap(_START_GFN, _PAGES),
        ),
    }
    told = []
    try:
        if _young_after_touches(vcpu, table) != _PAGES:
            raise _unsupported(engine, "no accessed bits at all")
        for name, (rearm, walker, act) in experiments.items():
            counts = [_young_after(act, vcpu, table) for _ in range(_TRIES)]
            shown = " ".join(map(str, counts))
            told.append(f"{name} {shown} of {_PAGES}")
            if min(counts) >= _MIN_SHARE * _PAGES:
                return Calibration(rearm, walker, "bits set again: " + ", ".join(told))
    finally:
        table.close()
    found = f"bits that do not come back after a zap ({', '.join(told)})"
    raise _unsupported(engine, found)


def _young_after(act: Callable[[], object], vcpu: Vcpu, table: LiveTable) -> int:
    """Do something between the clearing and the next touch; count what became young."""
    act()
    return _young_after_touches(vcpu, table)


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
