"""The trackers by name. A new one is its module and an entry here."""

from __future__ import annotations

from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.suggest import unknown_name
from kvmhost.trackers.base import BY_GPA, Support, TrackedVm, Tracker, TrackerInfo
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
        by_tables = vm.tables_gpa is not None and not vm.memory.aliases
        return GuestptTracker.name if by_tables else PagemapTracker.name
    if name not in _REGISTRY:
        raise LayoutError(unknown_name("tracker", name, ("auto", *NAMES)))
    return name


def create(name: str, vm: TrackedVm) -> Tracker:
    """Make a tracker for a VM; it is not started yet.

    :param name: one of :data:`NAMES`
    :raises CapabilityError: if it does not work here
    """
    if vm.memory.aliases and name in BY_GPA:
        raise CapabilityError(
            f"tracker {name}",
            "memory without aliased memslots, through which it sees no access",
            f"{len(vm.memory.aliases)} aliases",
            "use pagemap",
        )
    return _REGISTRY[name].for_vm(vm)


def describe(name: str) -> TrackerInfo:
    """Return a tracker's properties and costs."""
    return _REGISTRY[name].info


def probe_all(engine: EngineName = "auto") -> dict[str, Support]:
    """Try every tracker on an engine; report which works, and why one does not."""
    return {name: tracker.probe(engine) for name, tracker in _REGISTRY.items()}
