"""Chooses how much each harvest clears, so that the guest's lost time stays within a bound.

The guest loses a fault for each cleared page that it touches again. With the measured cost of
one (:meth:`kvmhost.vm.protocol.Vm.rearm_cost`), the processor time of the vCPUs between two
harvests says how many faults a harvest may cause. From these, the faults that the sweeps of
other readers cause are taken: they cost the guest as much.

What a harvest would cause is predicted, by class of pages (:mod:`kvmhost.reclaim.loss.clearing`),
from the pages that are young now; of the changing ones, also from how many of those that were
cleared were touched again. If it is too much, the share of the steady pages that is cleared falls
first, but not below a quarter of what is allowed, with which the steady pages are asked in
rotation; then the share of the changing ones. Both have a minimum. Below it the interval between
two harvests grows: the same pages then cost the same faults in a longer time.

A prediction may be wrong. So the faults that were counted in the last passes are compared with
the bound, and what is allowed shrinks while they exceed it.

Before the first harvest nothing is known. Then all resident pages are taken to be young and in
use, which clears the least.
"""

from __future__ import annotations

import collections
import dataclasses
import math

from kvmhost.reclaim.loss.clearing import ALL, ByClass, Clearing, HarvestFacts

__all__ = ["LEAST", "LossBound", "Spent"]

#: What is cleared at least.
LEAST = Clearing(steady=1 / 64, changing=1 / 32)
_MAX_STRETCH = 8.0
#: The part of the allowed faults that steady pages get even if others could take all.
_STEADY_PART = 1 / 4
#: The part of the bound that the daemon uses even if other readers take all.
_OWN_PART = 1 / 8
#: Passes over which the loss is measured.
_WINDOW = 10
#: Weight of the last pass in averages.
_WEIGHT = 0.3
#: A share grows only by more than this factor, so that noise does not change it.
_STEP = 1.25
_MIN_TRIM = 1 / 4


@dataclasses.dataclass(frozen=True)
class Spent:
    """What passed between two harvests.

    :param vcpu_ns: processor time of the vCPUs
    :param faults: cleared pages that the guest touched again, whoever cleared them
    """

    vcpu_ns: float
    faults: int


class LossBound:
    """The bound of one VM.

    :param max_loss: share of the vCPUs' time that re-arming may cost; infinity: no bound
    :ivar clearing: what the next harvest clears
    """

    def __init__(self, max_loss: float) -> None:
        self.max_loss, self.clearing = max_loss, ALL
        self._window: collections.deque[tuple[float, float]] = collections.deque(maxlen=_WINDOW)
        self._vcpu_ns = self._others = 0.0
        self._young: ByClass | None = None
        self._own = self._last_cleared = 0.0
        #: Averages: changing pages that were cleared, and known ones that were touched after that.
        self._cleared = self._touched = 0.0
        self._trim = 1.0

    @property
    def loss(self) -> float | None:
        """Share of the vCPUs' time that was lost in the last passes; None: not measured yet."""
        vcpu_ns = sum(spent[1] for spent in self._window)
        return min(sum(spent[0] for spent in self._window) / vcpu_ns, 1.0) if vcpu_ns else None

    @property
    def others(self) -> float:
        """Faults between two harvests that the sweeps of other readers cause."""
        return self._others

    def forget(self) -> None:
        """Forget what was measured: another tracker clears the pages now."""
        self._window.clear()
        self._vcpu_ns = self._others = self._own = 0.0
        self._young, self._trim = None, 1.0

    def choose(self, spent: Spent, fault_ns: float, n_resident: int) -> Clearing:
        """Choose what the next harvest clears.

        :param spent: since the harvest before
        :param fault_ns: cost of a fault
        :param n_resident: pages that could be young, where no harvest has told
        """
        self._measure(spent, fault_ns)
        if not math.isfinite(self.max_loss) or not fault_ns:
            self.clearing = ALL
            return ALL
        young = self._young if self._young is not None else ByClass(0.0, float(n_resident))
        wanted = self._divide(self._allowed(fault_ns), self._demand(young))
        if self._young is None:
            wanted = dataclasses.replace(wanted, stretch=1.0)
        self.clearing = _settled(self.clearing, wanted)
        return self.clearing

    def note(self, facts: HarvestFacts) -> None:
        """Take what a harvest showed."""
        self._young, self._own = facts.young, sum(facts.faults)
        self._cleared += (self._last_cleared - self._cleared) * _WEIGHT
        self._touched += (facts.faults.changing - self._touched) * _WEIGHT
        self._last_cleared = facts.cleared.changing

    def _measure(self, spent: Spent, fault_ns: float) -> None:
        """Account for the time since the last harvest."""
        lost_ns = spent.faults * fault_ns
        self._window.append((lost_ns, spent.vcpu_ns))
        base_ns = spent.vcpu_ns / self.clearing.stretch
        known = len(self._window) > 1
        self._vcpu_ns += (base_ns - self._vcpu_ns) * (_WEIGHT if known else 1.0)
        others = max(0.0, spent.faults - self._own)
        self._others += (others - self._others) * _WEIGHT
        loss = self.loss
        if loss and loss > self.max_loss:
            self._trim = max(_MIN_TRIM, self._trim * max(0.9, self.max_loss / loss))
        else:
            self._trim = min(1.0, self._trim * 1.1)

    def _allowed(self, fault_ns: float) -> float:
        """Return the faults that a harvest at the unstretched interval may cause."""
        all_of_them = self.max_loss * self._vcpu_ns / fault_ns
        others = self._others / self.clearing.stretch
        return max(all_of_them - others, all_of_them * _OWN_PART) * self._trim

    def _demand(self, young: ByClass) -> ByClass:
        """Return the faults that clearing all of each class would cause."""
        # Steady pages were touched in each window that is known. At first, all are taken to be.
        again = min(1.0, max(self._touched, 1.0) / max(self._cleared, 1.0))
        return ByClass(young.steady, young.changing * again)

    @staticmethod
    def _divide(allowed: float, demand: ByClass) -> Clearing:
        for_steady = min(demand.steady, allowed * _STEADY_PART)
        changing = _part(allowed - for_steady, demand.changing)
        steady = _part(allowed - min(1.0, changing) * demand.changing, demand.steady)
        missing = max(1.0, LEAST.steady / steady, LEAST.changing / changing)
        return Clearing(
            steady=min(1.0, max(LEAST.steady, steady)),
            changing=min(1.0, max(LEAST.changing, changing)),
            stretch=min(missing, _MAX_STRETCH),
        )


def _part(allowed: float, demand: float) -> float:
    return max(allowed, 1e-9) / demand if demand > 0 else math.inf


def _settled(old: Clearing, new: Clearing) -> Clearing:
    """Return the new choice, without increases that are small."""
    return Clearing(
        _grown(old.steady, new.steady),
        _grown(old.changing, new.changing),
        # A longer interval costs less, a larger share more.
        old.stretch if new.stretch < old.stretch < _STEP * new.stretch else new.stretch,
    )


def _grown(old: float, new: float) -> float:
    return old if old < new < min(1.0, _STEP * old) else new
