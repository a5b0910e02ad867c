"""What re-arms a cleared accessed bit here? Found out by trying, once a process.

A tiny guest touches a few pages, the bits are cleared, it touches them again:

- they are set again without any help: hardware walks the tables, nothing to do;
- they are set after the guest mapping was zapped: KVM shadows the tables, or
  needs its translations dropped;
- neither: the accessed bits of the guest's tables say nothing on this host.

Module parameters are not asked: nested, shadowing and emulated set-ups differ
in ways that no single parameter tells.
"""

from __future__ import annotations

import typing

from kvmhost.engine.base import Engine, RearmKind
from kvmhost.errors import CapabilityError

if typing.TYPE_CHECKING:
    from kvmhost.machine.tiny import Machine

__all__ = ["calibrated_rearm"]

_PAGES = 32
_START_GFN = 0x180
_found: dict[str, RearmKind] = {}


def calibrated_rearm(engine: Engine) -> RearmKind:
    """Return how to re-arm under an engine of this kind.

    :raises CapabilityError: if accessed bits do not come back by any means
    """
    if engine.fixed_rearm is not None:
        return engine.fixed_rearm
    if engine.name not in _found:
        _found[engine.name] = _calibrate(engine.name)
    return _found[engine.name]


def _calibrate(engine: str) -> RearmKind:
    from kvmhost.guests import image_path
    from kvmhost.machine.tiny import Machine

    params = {"start_gfn": _START_GFN, "pages": _PAGES, "epochs": 4}
    with Machine(image_path("touch"), mem_bytes=4 << 20, engine=engine, params=params) as machine:
        machine.step_by_doorbell()
        if _young_after(machine, RearmKind.NONE) != _PAGES:
            raise _unsupported(engine, "no accessed bits at all")
        if _young_after(machine, RearmKind.NONE) == _PAGES:
            return RearmKind.NONE
        if _young_after(machine, RearmKind.ZAP) == _PAGES:
            return RearmKind.ZAP
    raise _unsupported(engine, "bits that do not come back after a zap")


def _young_after(machine: Machine, kind: RearmKind) -> int:
    """Re-arm in one way, run an epoch, and count (and clear) what became young."""
    from kvmhost.trackers.guestpt import GuestptTracker

    tracker = GuestptTracker(machine, kind)
    try:
        tracker.rearm(_START_GFN, _PAGES)
        machine.run_epoch(timeout=30)
        return tracker.harvest(_START_GFN, _PAGES).count()
    finally:
        tracker.stop()


def _unsupported(engine: str, found: str) -> CapabilityError:
    return CapabilityError(
        "guestpt", "accessed bits in the guest's tables", f"engine {engine}: {found}",
        "use --tracker pagemap",
    )  # fmt: skip
