"""The tracker variants that are measured, and workloads whose touched pages are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from kvmhost.errors import CapabilityError, IoctlError
from kvmhost.guests import image_path
from kvmhost.guests.workloads import hotcold_gfns, hotcold_written_gfns, touch_gfns
from kvmhost.machine import Machine
from kvmhost.trackers import NAMES, Support, Tracker, describe, probe_all
from kvmhost.vm.names import EngineName

__all__ = [
    "CHANGING",
    "FREE_WORKLOADS",
    "GFN_START",
    "KINDS",
    "PAGES",
    "WORKLOADS",
    "AccuracyWorkload",
    "Bits",
    "TrackerKind",
    "probe_kinds",
]

GFN_START = 1024
PAGES = 4096
_MEM_BYTES = 64 << 20
#: Fewer than a guest of ``PAGES`` may write between harvests, so that rings fill up too.
_SMALL_RING = 2048
#: The maximum of KVM. If the ring is smaller than the set of pages that a guest keeps
#: writing, KVM exits to empty it and protect its pages, which costs the guest time
#: without any harvest.
_LARGE_RING = 65536

Bits = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class TrackerKind:
    """One variant of a tracker.

    :param ring_entries: size of the dirty rings where exactness is tested; 0: no rings
    :param large_ring_entries: size of the dirty rings where cost is measured
    """

    name: str
    tracker: str
    ring_entries: int = 0
    large_ring_entries: int = 0

    @property
    def only_writes(self) -> bool:
        """Return whether the tracker sees writes only."""
        return "reads" not in describe(self.tracker).sees

    def use(self, machine: Machine) -> Tracker:
        """Start the tracker on a machine that was created with ``dirty_ring_entries``."""
        return machine.use_tracker(self.tracker)


#: Every tracker; the dirty tracker with the dirty log and with dirty rings.
KINDS = {name: TrackerKind(name, name) for name in NAMES}
KINDS["dirty-ring"] = TrackerKind("dirty-ring", "dirty", _SMALL_RING, _LARGE_RING)


def probe_kinds(engine: EngineName) -> dict[str, Support]:
    """Try every kind on an engine; report which ones work, and why the others do not."""
    found = probe_all(engine)
    ring = KINDS["dirty-ring"]
    if found[ring.tracker].works:
        found[ring.name] = _probe_ring(ring, engine)
    else:
        found[ring.name] = found[ring.tracker]
    return found


def _probe_ring(ring: TrackerKind, engine: EngineName) -> Support:
    image, entries = image_path("touch"), ring.ring_entries
    try:
        with Machine(
            image, mem_bytes=4 << 20, engine=engine, dirty_ring_entries=entries
        ) as machine:
            ring.use(machine)
    except (CapabilityError, IoctlError) as error:
        return Support(False, str(error))
    return Support(True, "a dirty ring a vCPU")


@dataclasses.dataclass(frozen=True)
class AccuracyWorkload:
    """A guest with its parameters; its ``n_vcpus`` vCPUs share the pages."""

    image: str
    params: Mapping[str, int]
    n_vcpus: int = 1

    def machine(self, kind: TrackerKind, engine: EngineName) -> Machine:
        """Make a machine that runs the workload without end.

        For a tracker that sees writes only, ``touch`` writes, unless a parameter sets this.
        """
        params = {"gfn_start": GFN_START, "pages": PAGES, "epochs": 0}
        if self.image == "touch":
            params["write"] = int(kind.only_writes)
        params |= self.params
        return Machine(
            image_path(self.image),
            mem_bytes=_MEM_BYTES,
            engine=engine,
            n_vcpus=self.n_vcpus,
            params=params,
            dirty_ring_entries=kind.ring_entries,
        )

    def touched(
        self, params: Mapping[str, int], epoch: int, only_writes: bool, vcpu: int | None = None
    ) -> Bits:
        """Return which pages of the range an epoch touches, or writes.

        :param vcpu: count the accesses of this vCPU only; None: of all vCPUs
        """
        bits = np.zeros(PAGES, dtype=bool)
        if self.image == "hotcold":
            of_epoch = hotcold_written_gfns if only_writes else hotcold_gfns
            bits[of_epoch(params, epoch, self.n_vcpus, vcpu) - GFN_START] = True
        elif params["write"] or not only_writes:
            bits[touch_gfns(params, epoch, self.n_vcpus, vcpu) - GFN_START] = True
        return bits


_HOTCOLD = {"hot": 512, "cold": 64, "scan_every": 6, "scan_epochs": 3}
_PHASES = {"hot": 512, "cold": 16, "scan_every": 0, "phase_every": 4, "phase_step": 700}
_ZIPF = {"hot": 0, "cold": 0, "scan_every": 0, "zipf": 600}

#: Workloads by name.
WORKLOADS = {
    "sequential": AccuracyWorkload("touch", {}),
    "strided": AccuracyWorkload("touch", {"stride": 5}),
    "random": AccuracyWorkload("touch", {"pattern": 2, "count": 600}),
    "random-writes": AccuracyWorkload("touch", {"pattern": 2, "count": 600, "write": 1}),
    "zipf-0.9": AccuracyWorkload("hotcold", _ZIPF | {"zipf_permille": 900}),
    "zipf-0.99": AccuracyWorkload("hotcold", _ZIPF | {"zipf_permille": 990}),
    "read-only": AccuracyWorkload("hotcold", _HOTCOLD | {"write_permille": 0}),
    "write-only": AccuracyWorkload("hotcold", _HOTCOLD | {"write_permille": 1000}),
    "hotcold-scan": AccuracyWorkload("hotcold", _HOTCOLD),
    "hotcold-phases": AccuracyWorkload("hotcold", _PHASES),
    "random-2-vcpus": AccuracyWorkload("touch", {"pattern": 2, "count": 600, "write": 1}, 2),
    "phases-2-vcpus": AccuracyWorkload("hotcold", _PHASES, 2),
}
#: Workloads in which pages become cold and hot again, which shows the staleness of a sample.
CHANGING = ("random-writes", "zipf-0.9", "hotcold-phases", "phases-2-vcpus")
#: For guests that keep running: epochs so short that a few of them touch only few pages.
FREE_WORKLOADS = {
    "random-writes": AccuracyWorkload("touch", {"pattern": 2, "count": 60, "write": 1}),
    "zipf-0.9": AccuracyWorkload("hotcold", _ZIPF | {"zipf": 60, "words": 8}),
    "phases-2-vcpus": AccuracyWorkload(
        "hotcold",
        _PHASES | {"hot": 64, "cold": 8, "phase_every": 50, "words": 8},
        2,
    ),
}
