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
from collections.abc import Callable

from kvmhost.engine.base import Engine, RearmKind
from kvmhost.errors import CapabilityError
from kvmhost.mmu.tdp import LiveTable
from kvmhost.trackers.probeguest import GFN_START, ProbeGuest, probe_guest
from kvmhost.vm.names import EngineName

__all__ = ["Calibration", "calibrate"]

_PAGES = 32
_TRIES = 3
#: Of the pages of each try; the rest may be translations that happened to stay or to go.
_MIN_SHARE = 0.9


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
    with probe_guest(name, _PAGES) as guest:
        return _find_rearm(name, guest)


def _find_rearm(engine: str, guest: ProbeGuest) -> Calibration:
    table = LiveTable.of_guest(guest.memory, guest.tables_gpa)
    experiments: dict[str, tuple[RearmKind, str, Callable[[], object]]] = {
        "without help": (RearmKind.NONE, "hardware walks the tables", lambda: None),
        "after a TLB flush": (
            RearmKind.ZAP,
            "hardware walks the tables, and its TLB keeps translations over exits",
            guest.vcpu.flush_guest_tlb,
        ),
        "after a zap": (
            RearmKind.ZAP,
            "KVM shadows the tables",
            lambda: guest.memory.regions[0].zap(GFN_START, _PAGES),
        ),
    }
    told = []
    try:
        if _young_after_touches(guest, table) != _PAGES:
            raise _unsupported(engine, "no accessed bits at all")
        for name, (rearm, walker, act) in experiments.items():
            counts = [_young_after(act, guest, table) for _ in range(_TRIES)]
            shown = " ".join(map(str, counts))
            told.append(f"{name} {shown} of {_PAGES}")
            if min(counts) >= _MIN_SHARE * _PAGES:
                return Calibration(rearm, walker, "bits set again: " + ", ".join(told))
    finally:
        table.close()
    found = f"bits that do not come back after a zap ({', '.join(told)})"
    raise _unsupported(engine, found)


def _young_after(act: Callable[[], object], guest: ProbeGuest, table: LiveTable) -> int:
    """Do something between the clearing and the next touch; count what became young."""
    act()
    return _young_after_touches(guest, table)


def _young_after_touches(guest: ProbeGuest, table: LiveTable) -> int:
    """Run the guest to its doorbell; count, and clear, what became young."""
    guest.touch_all()
    return table.harvest(GFN_START, _PAGES).count()


def _unsupported(engine: str, found: str) -> CapabilityError:
    return CapabilityError(
        "tracker guestpt", "accessed bits in the guest's tables", f"engine {engine}: {found}",
        "use --tracker pagemap",
    )  # fmt: skip
