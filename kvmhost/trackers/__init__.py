"""Trackers: where a young bit comes from.

========= =========================================== ============= ================
tracker   how                                         sees          granularity
========= =========================================== ============= ================
guestpt   accessed bits in the guest's own tables     reads, writes 4 KiB
pagemap   which host PTEs came back after a zap       reads, writes 4 KiB, or 64 KiB
                                                                    without userfaultfd
dirty     KVM's dirty log or dirty rings              writes        4 KiB
uffd      minor faults that userspace answers         reads, writes 4 KiB
                                                      and order
idle      the kernel's idle flags, by pfn             reads, writes 4 KiB, or the
                                                                    huge page
========= =========================================== ============= ================

``auto`` is ``guestpt`` for a tiny guest, ``pagemap`` for one that makes its own tables.
One tracker at a time works on a machine: re-arming for one takes away what another
looks at.
"""

from __future__ import annotations

import typing
from collections.abc import Callable

from kvmhost.errors import LayoutError
from kvmhost.memory.layout import TinyLayout
from kvmhost.trackers.base import Support, Tracker, TrackerInfo
from kvmhost.trackers.dirty import DirtyTracker
from kvmhost.trackers.guestpt import GuestptTracker
from kvmhost.trackers.idle import IdleTracker
from kvmhost.trackers.pagemap import PagemapTracker
from kvmhost.trackers.sampling import sample_mask
from kvmhost.trackers.uffd import UffdTracker

if typing.TYPE_CHECKING:
    from kvmhost.machine.base import BaseMachine

__all__ = [
    "NAMES",
    "Support",
    "Tracker",
    "TrackerInfo",
    "create",
    "describe",
    "probe_all",
    "resolve",
    "sample_mask",
]

_Registered = (
    type[GuestptTracker]
    | type[PagemapTracker]
    | type[DirtyTracker]
    | type[UffdTracker]
    | type[IdleTracker]
)

_REGISTRY: dict[str, _Registered] = {
    GuestptTracker.name: GuestptTracker,
    PagemapTracker.name: PagemapTracker,
    DirtyTracker.name: DirtyTracker,
    UffdTracker.name: UffdTracker,
    IdleTracker.name: IdleTracker,
}

#: Trackers by name, best first.
NAMES = tuple(_REGISTRY)


def resolve(name: str, machine: BaseMachine) -> str:
    """Return the name that ``auto`` stands for on this machine, or the name itself.

    :raises LayoutError: for an unknown name
    """
    if name == "auto":
        tiny = isinstance(machine.layout, TinyLayout)
        return GuestptTracker.name if tiny else PagemapTracker.name
    if name not in _REGISTRY:
        raise LayoutError(f"unknown tracker {name!r}; there are: auto, {', '.join(NAMES)}")
    return name


def create(name: str, machine: BaseMachine) -> Tracker:
    """Make a tracker for a machine; it is not started yet.

    :raises CapabilityError: if it does not work here
    """
    factory: Callable[[BaseMachine], Tracker] = _REGISTRY[name]
    return factory(machine)


def describe(name: str) -> TrackerInfo:
    """Return what a tracker sees and what it costs."""
    return _REGISTRY[name].info


def probe_all(engine: str = "auto") -> dict[str, Support]:
    """Try every tracker on an engine; say which works, and why one does not."""
    return {name: tracker.probe(engine) for name, tracker in _REGISTRY.items()}
