"""Harvests at doorbells, where the guest is stopped and the expected result is exact."""

from __future__ import annotations

import dataclasses
import statistics
import time

import numpy as np

from kvmhost.tools.accuracy.kinds import GFN_START, PAGES, AccuracyWorkload, Bits, TrackerKind
from kvmhost.tools.outputs.accuracy import DoorbellRow
from kvmhost.trackers import sample_mask
from kvmhost.vm.names import EngineName

__all__ = ["harvests_until", "measure"]


def measure(
    kind: TrackerKind,
    name: str,
    workload: AccuracyWorkload,
    engine: EngineName,
    n_epochs: int,
    period: int,
) -> DoorbellRow:
    """Harvest at the end of each epoch and compare with the pages that it touched.

    :param name: of the workload
    :param period: each harvest clears one page in ``period``
    """
    truth = np.zeros((n_epochs, PAGES), dtype=bool)
    found = np.zeros_like(truth)
    harvest_ns, rearm_ns = [], []
    coarse = False
    with workload.machine(kind, engine) as machine:
        machine.step_by_doorbell()
        tracker = kind.use(machine)
        for epoch in range(n_epochs):
            machine.run_epoch()
            mask = sample_mask(PAGES, period, epoch, GFN_START)
            start = time.perf_counter_ns()
            young = tracker.harvest(GFN_START, PAGES, mask=mask)
            middle = time.perf_counter_ns()
            cleared = dataclasses.replace(young, words=young.words & mask)
            tracker.rearm(GFN_START, PAGES, cleared)
            rearm_ns.append((time.perf_counter_ns() - middle) / PAGES)
            harvest_ns.append((middle - start) / PAGES)
            coarse = coarse or (young.coarse is not None and bool(young.coarse.any()))
            found[epoch] = young.as_bool()
            truth[epoch] = workload.touched(machine.params, epoch, kind.only_writes)
    old, new = (harvests_until(truth, found, becomes) for becomes in (False, True))
    right = int((truth & found).sum())
    return DoorbellRow(
        tracker=kind.name,
        workload=name,
        fraction=1 / period,
        coarse=coarse,
        touches=int(truth.sum()),
        reported_pages=int(found.sum()),
        # With no reported page the precision is 1; with no page to find the recall is 1.
        precision_ratio=right / int(found.sum()) if found.any() else 1.0,
        recall_ratio=right / int(truth.sum()) if truth.any() else 1.0,
        mean_old_after_harvests=statistics.fmean(old) if old else None,
        max_old_after_harvests=max(old, default=None),
        mean_new_after_harvests=statistics.fmean(new) if new else None,
        max_new_after_harvests=max(new, default=None),
        harvest_ns_per_page=statistics.median(harvest_ns),
        rearm_ns_per_page=statistics.median(rearm_ns),
    )


def harvests_until(truth: Bits, found: Bits, becomes: bool) -> list[int]:
    """Return the number of harvests until each change of a page to ``becomes`` is reported.

    A change is left out if it is reverted, or the run ends, before it is reported.
    """
    waits = []
    n_epochs = truth.shape[0]
    for epoch in range(1, n_epochs):
        waiting = (truth[epoch] == becomes) & (truth[epoch - 1] != becomes)
        for later in range(epoch, n_epochs):
            waiting = waiting & (truth[later] == becomes)
            shown = waiting & (found[later] == becomes)
            waits += [later - epoch + 1] * int(shown.sum())
            waiting = waiting & ~shown
    return waits
