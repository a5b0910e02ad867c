"""The three rows of 2023: the second pass over memory, with three methods of aging.

A guest writes all its memory, gets a limit of half of it, and accesses it again in steps
of a 32nd. After each step, reclaim must bring the guest back under the limit before it
continues, as in direct reclaim: harvest, aging, tests of the victims, eviction. Without
the capability ``spte walk``, ``lru_gen`` tests pages one by one, each with a flush; with
it, ``lru_gen`` tests pages in batches, with one flush per batch. ``classic`` has two lists
and tests pages one by one. Each test of a single page is a call from Python, which takes
some tens of microseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from kvmhost.bitmap import Words, n_words, pack, unpack
from kvmhost.reclaim.policy.base import Policy
from kvmhost.reclaim.policy.classic import Classic
from kvmhost.reclaim.policy.lru_gen import Caps, LruGen
from kvmhost.tools.bench.reclaim.guests import booted
from kvmhost.tools.bench.reclaim.inprocess import Reclaimer
from kvmhost.tools.bench.reclaim.workloads import guest_params
from kvmhost.tools.outputs.benchparts import SecondPassRow

__all__ = ["run"]

_REPEATS = 3
_STEPS = 32


class _PageByPage(Reclaimer):
    """Harvests a batch one page at a time."""

    def clear_young(self, pages: Words) -> Words:
        asked = np.flatnonzero(unpack(pages, self.n_pages))
        bits = np.zeros(self.n_pages, dtype=bool)
        for gfn in asked:
            bits[gfn] = self.clear_flush_young(int(gfn))
        return pack(bits)

    def _harvest(self, mask: Words | None) -> Words:
        if mask is not None and not mask.any():
            return np.zeros(n_words(self.n_pages), dtype=np.uint64)
        resident = pack(self.resident())
        return self.clear_young(resident if mask is None else resident & mask)


def run(pages: int, tell: Callable[[str], None]) -> list[SecondPassRow]:
    """Return one row per method of aging, with the ratio to the batched method.

    :raises CapabilityError: without /dev/kvm
    """
    before = Caps.ALL & ~Caps.SPTE_WALK
    ways: dict[str, tuple[Callable[[int], Policy], type[Reclaimer]]] = {
        "batched, no lock": (lambda n: LruGen(n, probes=True), Reclaimer),
        "page by page, locked": (lambda n: LruGen(n, probes=True, caps=before), _PageByPage),
        "classic": (lambda n: Classic(n, probes=True), Reclaimer),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    faults: dict[str, list[int]] = {name: [] for name in ways}
    for _ in range(_REPEATS):
        for name, (make, kind) in ways.items():
            tell(f"second pass, {name}")
            took, came = _second_pass(pages, make, kind)
            times[name].append(took)
            faults[name].append(came)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        SecondPassRow(
            aging=name,
            second_pass_s=medians[name],
            of_batched_ratio=medians[name] / medians["batched, no lock"],
            fault_ins=round(statistics.median(faults[name])),
        )
        for name in ways
    ]


def _second_pass(
    pages: int, make: Callable[[int], Policy], kind: type[Reclaimer]
) -> tuple[float, int]:
    params = guest_params(lambda p: {"scan_every": _STEPS, "scan_epochs": _STEPS}, pages)
    with booted(params | {"epochs": 0}) as machine:
        touched = int(Reclaimer(machine, None, 0).resident().sum())
        reclaimer = kind(machine, make(machine.memory.gfn_end), touched // 2, pages // _STEPS)
        before = machine.open_pager().counters()["fault_ins"]
        start = time.perf_counter()
        for _ in range(_STEPS):
            machine.run_epoch()
            reclaimer.run_pass()
        took = time.perf_counter() - start
        return took, int(machine.open_pager().counters()["fault_ins"] - before)
