"""Harvests of a running guest, with bounds on the pages that it touched.

Doorbells are counted without stopping the guest. An epoch that began after the last
re-arming and rang its doorbell before the harvest lies inside the window: its pages are
certain. The pages of an epoch that overlaps the window in any way are possible. A tracker
must report all certain pages and no page that is not possible; its precision lies between
the values for the two sets.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping

import numpy as np

from kvmhost.bitmap import YoungBitmap
from kvmhost.engine.base import Vcpu
from kvmhost.machine import Machine
from kvmhost.timescale import scaled
from kvmhost.tools.accuracy.kinds import (
    FREE_WORKLOADS,
    GFN_START,
    PAGES,
    AccuracyWorkload,
    Bits,
    TrackerKind,
)
from kvmhost.tools.outputs.accuracy import RunningRow
from kvmhost.vm.names import EngineName

__all__ = ["measure"]

#: A window must contain whole epochs, or no page of it is certain.
_EPOCHS = 4
_POLL_S = 0.0005
_MAX_WINDOWS = 250
#: Maximum length of the first window, on a host that is busy with other work.
_FIRST_S = scaled(30.0)


@dataclasses.dataclass(frozen=True)
class _Window:
    """One harvest, with the doorbell counts of each vCPU at the times that bound it."""

    young: YoungBitmap
    began: list[int]
    armed: list[int]
    before: list[int]
    after: list[int]


def measure(
    kind: TrackerKind, workload_name: str, engine: EngineName, seconds: float
) -> RunningRow:
    """Harvest repeatedly; check each bitmap against its bounds."""
    workload = FREE_WORKLOADS[workload_name]
    sums = dict.fromkeys(("young", "certain", "missed", "wrong", "confirmed"), 0)
    with workload.machine(kind, engine) as machine:
        windows = _harvest(machine, kind, seconds)
        params = machine.params
    # Computed after the run: it takes longer than the guest takes for as many epochs.
    for window in windows:
        # Epochs in progress at either end count as possible, not as certain.
        possible = _union(workload, params, kind, window.began, window.after, 1)
        certain = _union(workload, params, kind, window.armed, window.before, 0)
        _add(sums, window.young.as_bool(), certain, possible)
    coarse = any(w.young.coarse is not None and w.young.coarse.any() for w in windows)
    return _row(kind.name, workload_name, len(windows), sums, bool(coarse))


def _row(
    tracker: str, workload: str, harvests: int, sums: dict[str, int], coarse: bool
) -> RunningRow:
    young, certain = max(sums["young"], 1), max(sums["certain"], 1)
    return RunningRow(
        tracker=tracker,
        workload=workload,
        harvests=harvests,
        n_young=sums["young"],
        certain_pages=sums["certain"],
        confirmed_pages=sums["confirmed"],
        missed_pages=sums["missed"],
        wrong_pages=sums["wrong"],
        min_precision_ratio=sums["confirmed"] / young if sums["young"] else 1.0,
        max_precision_ratio=1 - sums["wrong"] / young,
        recall_ratio=1 - sums["missed"] / certain,
        coarse=coarse,
    )


def _harvest(machine: Machine, kind: TrackerKind, seconds: float) -> list[_Window]:
    pause = threading.Event()
    windows: list[_Window] = []
    machine.step_by_doorbell()
    tracker = kind.use(machine)
    for _ in range(3):
        machine.run_epoch()
    tracker.rearm(GFN_START, PAGES, tracker.harvest(GFN_START, PAGES))
    began = armed = _epochs(machine.vcpus)
    machine.step_by_doorbell(False)
    deadline = time.monotonic() + seconds
    while len(windows) < _MAX_WINDOWS:
        if time.monotonic() >= deadline + (0 if windows else _FIRST_S):
            break
        before = _epochs(machine.vcpus)
        if any(now < then + _EPOCHS for now, then in zip(before, armed, strict=True)):
            pause.wait(_POLL_S)
            continue
        young = tracker.harvest(GFN_START, PAGES)
        after = _epochs(machine.vcpus)
        tracker.rearm(GFN_START, PAGES, young)
        windows.append(_Window(young, began, armed, before, after))
        began, armed = before, _epochs(machine.vcpus)
    return windows


def _epochs(vcpus: list[Vcpu]) -> list[int]:
    return [vcpu.epoch for vcpu in vcpus]


def _union(
    workload: AccuracyWorkload,
    params: Mapping[str, int],
    kind: TrackerKind,
    starts: list[int],
    ends: list[int],
    in_progress: int,
) -> Bits:
    """Return the pages that the vCPUs touched in the epochs between two doorbell readings.

    :param in_progress: 1: include the epochs in progress at either reading
    """
    bits = np.zeros(PAGES, dtype=bool)
    for vcpu, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for epoch in range(start + 2 - in_progress, end + 1 + in_progress):
            bits |= workload.touched(params, epoch, kind.only_writes, vcpu)
    return bits


def _add(sums: dict[str, int], young: Bits, certain: Bits, possible: Bits) -> None:
    sums["young"] += int(young.sum())
    sums["certain"] += int(certain.sum())
    sums["missed"] += int((certain & ~young).sum())
    sums["wrong"] += int((young & ~possible).sum())
    sums["confirmed"] += int((certain & young).sum())
