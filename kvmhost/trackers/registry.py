"""The trackers by name. A new one is its module and an entry here."""

from __future__ import annotations

from kvmhost.errors import LayoutError
from kvmhost.suggest import unknown_name
from kvmhost.trackers.base import Support, TrackedVm, Tracker, TrackerInfo
from kvmhost.trackers.dirty import DirtyTracker
from kvmhost.trackers.guestpt import GuestptTracker
from kvmhost.trackers.idle import IdleTracker
from kvmhost.trackers.pagemap import PagemapTracker
from kvmhost.trackers.uffd import UffdTracker
from kvmhost.vm.names import EngineName

__all__ = ["NAMES", "create", "describe", "probe_all", "resolve"]

_TRACKERS: tuple[type[Tracker], ...] = (
    GuestptTracker,
    PagemapTracker,
    DirtyTracker,
    UffdTracker,
    IdleTracker,
)
_REGISTRY = {tracker.name: tracker for tracker in _TRACKERS}

#: Trackers by name, best first.
NAMES = tuple(_REGISTRY)


def resolve(name: str, vm: TrackedVm) -> str:
    """Return the tracker that ``auto`` selects on this VM, or the name itself.

    :raises LayoutError: for an unknown name
    """
    if name == "auto":
        return PagemapTracker.name if vm.tables_gpa is None else GuestptTracker.name
    if name not in _REGISTRY:
        raise LayoutError(unknown_name("tracker", name, ("auto", *NAMES)))
    return name


def create(name: str, vm: TrackedVm) -> Tracker:
    """Make a tracker for a VM; it is not started yet.

    :param name: one of :data:`NAMES`
    :raises CapabilityError: if it does not work here
    """
    return _REGISTRY[name].for_vm(vm)


def describe(name: str) -> TrackerInfo:
    """Return a tracker's properties and costs."""
    return _REGISTRY[name].info


def probe_all(engine: EngineName = "auto") -> dict[str, Support]:
    """Try every tracker on an engine; report which works, and why one does not."""
    return {name: tracker.probe(engine) for name, tracker in _REGISTRY.items()}
