"""How far predictions are from what happens: a guest that is really run under a policy.

The guest runs twice for each budget, epoch by epoch. The first time nothing is taken
away and its windows are recorded: that is what a prediction is made from. The second
time the policy's victims are really evicted after each epoch and the guest really
faults on them; the pager counts what it brings back. Both runs do the same, since the
guest's choices follow from its seed; what differs is what the model leaves out: pages
that cannot go, pages that the VMM or the page-table walker touches, and neighbours that
come back unasked.
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

__all__ = ["ErrorBar", "RealRun", "measure_error", "predict", "run_real"]

_MEM_BYTES = 24 << 20
_EPOCHS = 48
#: Shares of the pages that the guest touches.
_BUDGETS = (0.3, 0.5, 0.7)
_PARAMS = {
    "start_gfn": 1024, "pages": 3072, "hot": 512, "cold": 192, "scan_every": 16,
    "scan_epochs": 8, "epochs": 0,
}  # fmt: skip
_STEP_NS = 10**9


@dataclasses.dataclass(frozen=True)
class RealRun:
    """One budget: refaults as predicted, and as they were."""

    budget_pages: int
    predicted: int
    real: int

    @property
    def ratio(self) -> float:
        """Real over predicted; with 1 added to both, so that 0 of 0 is 1."""
        return (self.real + 1) / (self.predicted + 1)


@dataclasses.dataclass(frozen=True)
class ErrorBar:
    """The range of real over predicted refaults, over all real runs of a policy."""

    engine: str
    runs: list[RealRun]
    lowest: float
    highest: float

    def around(self, predicted: float) -> tuple[float, float]:
        """Return what to expect at least and at most."""
        return (
            round(predicted * min(self.lowest, 1.0), 3),
            round(predicted * max(self.highest, 1.0), 3),
        )

    def line(self, policy: str) -> str:
        """Return it in words."""
        said = ", ".join(f"{run.real} of {run.predicted} predicted" for run in self.runs)
        return (
            f"{policy}: low and high are {min(self.lowest, 1.0):.3f} and "
            f"{max(self.highest, 1.0):.3f} times a_minute, the range of {len(self.runs)} real "
            f"runs here ({self.engine}): {said}"
        )


def measure_error(
    policy: str, *, engine: str = "auto", budgets: Sequence[float] = _BUDGETS, epochs: int = _EPOCHS
) -> ErrorBar:
    """Predict and run, at each of the budgets.

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
    """Return the refaults that a replay has."""
    timed = [((number + 1) * _STEP_NS, row) for number, row in enumerate(windows)]
    return replay(timed, make_policy(policy, n_pages, {}), budget_pages).refaults


def run_real(policy: str, engine: str, epochs: int, budget_pages: int) -> int:
    """Run the guest under the policy; return the pages that faulted back in."""
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
    """Have the VM choose what the policy protects, as a daemon does at the limit."""
    machine.open_pager().set_limit(budget_pages)
    machine.open_pager().shrink()
    machine.open_pager().set_limit(0)


def _record(engine: str, epochs: int) -> tuple[Words, int, str]:
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


def _machine(engine: str) -> Machine:
    machine = Machine(
        image_path("hotcold"), mem_bytes=_MEM_BYTES, engine=engine, params=dict(_PARAMS)
    )
    machine.step_by_doorbell()
    return machine
