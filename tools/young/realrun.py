"""The error of predictions, measured by running a guest under a policy.

The guest runs twice for each budget, epoch by epoch. In the first run nothing is evicted
and the windows are recorded; predictions are made from this record. In the second run the
policy's victims are evicted after each epoch and the guest faults on them; the pager
counts the refaults. The guest's accesses are the same in both runs, since they depend on
its seed only. The differences are due to effects that the model omits: pages that cannot
be evicted, pages that the VMM or the page-table walker touches, and neighbouring pages
that are faulted in as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from kvmhost.bitmap import Words, pack
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.reclaim.analyse.whatif import make_policy
from kvmhost.reclaim.policy.replay import replay
from kvmhost.units import PAGE_BYTES
from kvmhost.vm.names import EngineName

__all__ = ["ErrorBar", "RealRun", "measure_error", "predict", "run_real"]

_MEM_BYTES = 24 << 20
_EPOCHS = 48
#: Budgets as shares of the pages that the guest touches.
_BUDGETS = (0.3, 0.5, 0.7)
_PARAMS = {
    "gfn_start": 1024, "pages": 3072, "hot": 512, "cold": 192, "scan_every": 16,
    "scan_epochs": 8, "epochs": 0,
}  # fmt: skip
_STEP_NS = 10**9


@dataclasses.dataclass(frozen=True)
class RealRun:
    """The predicted and the measured number of refaults for one budget."""

    budget_pages: int
    predicted: int
    real: int

    @property
    def ratio(self) -> float:
        """Measured over predicted refaults, with 1 added to both, so that 0 over 0 is 1."""
        return (self.real + 1) / (self.predicted + 1)


@dataclasses.dataclass(frozen=True)
class ErrorBar:
    """The range of measured over predicted refaults, over all runs of a policy."""

    engine: EngineName
    runs: list[RealRun]
    lowest: float
    highest: float

    def around(self, predicted: float) -> tuple[float, float]:
        """Return the smallest and the largest number of refaults to expect."""
        return (
            round(predicted * min(self.lowest, 1.0), 3),
            round(predicted * max(self.highest, 1.0), 3),
        )

    def line(self, policy: str) -> str:
        """Return the range as text."""
        said = ", ".join(f"{run.real} of {run.predicted} predicted" for run in self.runs)
        return (
            f"{policy}: low and high are {min(self.lowest, 1.0):.3f} and "
            f"{max(self.highest, 1.0):.3f} times per_minute, the range of {len(self.runs)} real "
            f"runs here ({self.engine}): {said}"
        )


def measure_error(
    policy: str,
    *,
    engine: EngineName = "auto",
    budgets: Sequence[float] = _BUDGETS,
    epochs: int = _EPOCHS,
) -> ErrorBar:
    """Predict and measure refaults for each budget.

    :param budgets: shares of the pages that the guest touches
    """
    windows, n_pages, name = _record(engine, epochs)
    touched = int(np.unpackbits(np.bitwise_or.reduce(windows, axis=0).view(np.uint8)).sum())
    runs = []
    for share in budgets:
        budget = max(int(share * touched), 1)
        predicted = predict(policy, windows, n_pages, budget)
        runs.append(RealRun(budget, predicted, run_real(policy, engine, epochs, budget)))
    ratios = [run.ratio for run in runs]
    return ErrorBar(name, runs, min(ratios), max(ratios))


def predict(policy: str, windows: Words, n_pages: int, budget_pages: int) -> int:
    """Return the number of refaults of a replay."""
    timed = [((number + 1) * _STEP_NS, row) for number, row in enumerate(windows)]
    return replay(timed, make_policy(policy, n_pages, {}), budget_pages).refaults


def run_real(policy: str, engine: EngineName, epochs: int, budget_pages: int) -> int:
    """Run the guest under the policy; return the number of refaults."""
    with _machine(engine) as machine:
        tracker = machine.use_tracker("auto")
        n_pages = machine.memory.gfn_end
        decider = make_policy(policy, n_pages, {})
        machine.open_pager().arm()
        movable = np.ones(n_pages, dtype=bool)
        for gpa, n_bytes in machine.layout.pinned_ranges:
            movable[gpa >> 12 : (gpa + n_bytes + 4095) >> 12] = False
        before = np.zeros(n_pages, dtype=bool)
        for epoch in range(epochs):
            now_ns = (epoch + 1) * _STEP_NS
            machine.run_epoch()
            decider.plan(None)
            young = tracker.harvest(0, n_pages)
            tracker.rearm(0, n_pages, young)
            resident = machine.memory.resident()
            decider.refaulted(np.flatnonzero(resident & ~before), now_ns)
            decider.age(young.words, now_ns)
            excess = int(resident.sum()) - budget_pages
            if excess > 0:
                victims = decider.victims(excess, resident & movable, now_ns)
                machine.open_pager().evict(victims)
                if victims.size < excess:
                    _force(machine, budget_pages)
                now = machine.memory.resident()
                decider.evicted(np.flatnonzero(resident & ~now), now_ns)
                resident = now
            before = resident
        return int(machine.open_pager().counters()["fault_ins"])


def _force(machine: Machine, budget_pages: int) -> None:
    """Let the VM evict pages that the policy protects, as it does at its resident limit."""
    machine.set_limit(budget_pages * PAGE_BYTES)
    machine.open_pager().shrink()
    machine.set_limit(0)


def _record(engine: EngineName, epochs: int) -> tuple[Words, int, EngineName]:
    with _machine(engine) as machine:
        tracker = machine.use_tracker("auto")
        n_pages = machine.memory.gfn_end
        rows = []
        for _ in range(epochs):
            machine.run_epoch()
            young = tracker.harvest(0, n_pages)
            tracker.rearm(0, n_pages, young)
            rows.append(pack(young.as_bool()))
        return np.array(rows), n_pages, machine.engine.name


def _machine(engine: EngineName) -> Machine:
    machine = Machine(
        image_path("hotcold"), mem_bytes=_MEM_BYTES, engine=engine, params=dict(_PARAMS)
    )
    machine.step_by_doorbell()
    return machine
