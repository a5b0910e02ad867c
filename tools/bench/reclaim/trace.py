"""Part ``trace``, deterministic: windows computed from a seed, replayed through policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kvmhost.bitmap import Words, pack, unpack
from kvmhost.guests.workloads import hotcold_gfns
from kvmhost.reclaim.policy.base import Everything, Gfns, HarvestPlan, Mask, Policy, Probe
from kvmhost.reclaim.policy.belady import belady
from kvmhost.reclaim.policy.classic import Classic
from kvmhost.reclaim.policy.lru_gen import LruGen
from kvmhost.reclaim.policy.registry import create
from kvmhost.reclaim.policy.replay import ReplayResult, replay
from kvmhost.tools.bench.reclaim.workloads import WORKLOADS, guest_params
from kvmhost.tools.outputs.benchparts import TraceRow

__all__ = ["Ranking", "run", "windows_of"]

_SECOND_NS = 1_000_000_000

Trace = list[tuple[int, Words]]
#: Rows other than Belady's, in this order.
_POLICIES: Mapping[str, Callable[[int, Trace], Policy]] = {
    "lru_gen": lambda n, trace: create("lru_gen", n),
    "lru_gen+filter": lambda n, trace: LruGen(n, probes=True),
    "classic": lambda n, trace: Classic(n, probes=True),
    "age": lambda n, trace: create("age", n),
    "random": lambda n, trace: create("random", n),
    "ranking": lambda n, trace: Ranking(n, trace),
}


class Ranking:
    """Keep the pages with the most touches in the whole trace.

    This policy knows the probability of each touch, but not the sequence. If touches are
    drawn independently of the past, no online policy can do better in the long run; so it
    shows how much of Belady's advantage is out of reach.
    """

    name = "ranking"

    def __init__(self, n_pages: int, trace: Trace) -> None:
        self.n_pages = n_pages
        counts = np.zeros(n_pages, dtype=np.int64)
        for _, words in trace:
            counts += unpack(words, n_pages)
        self._counts = counts

    def plan(self, tables_young: Words | None = None) -> HarvestPlan:
        """Request a harvest of all pages."""
        return Everything

    def refaulted(self, gfns: Gfns, now_ns: int) -> None:
        """Ignore refaults."""

    def age(self, young: Words, now_ns: int) -> None:
        """Ignore young pages."""

    def victims(self, n: int, candidates: Mask, now_ns: int, probe: Probe | None = None) -> Gfns:
        """Return the candidates with the fewest touches."""
        pages = np.flatnonzero(candidates)
        return pages[np.argsort(self._counts[pages], kind="stable")[: max(n, 0)]]

    def evicted(self, gfns: Gfns, now_ns: int) -> None:
        """Ignore evictions."""

    def sizes(self, pages: Mask) -> list[tuple[int, int]]:
        """Return nothing."""
        return []

    def counters(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def explain(self, gfn: int) -> dict[str, int | float | str]:
        """Return the number of touches of a page."""
        return {"windows": int(self._counts[gfn])}


def run(
    workloads: Sequence[str],
    pages: int,
    windows: int,
    budgets: Sequence[float],
    tell: Callable[[str], None],
) -> list[TraceRow]:
    """Replay every workload under every budget; return one row per policy.

    If there are several guests, each has a policy instance and a share of the budget; rows
    contain their sums.
    """
    rows = []
    for name in workloads:
        guests = WORKLOADS[name].guests
        share = pages // len(guests)
        traces = [windows_of(guest_params(g, share), windows) for g in guests]
        for budget in budgets:
            tell(f"trace {name}, budget {budget:.0%}")
            budget_pages = int(share * budget)
            results = {"belady": [belady(trace, share, budget_pages) for trace in traces]}
            for policy, make in _POLICIES.items():
                results[policy] = [replay(t, make(share, t), budget_pages) for t in traces]
            best = sum(result.refaults for result in results["belady"])
            rows += [_sum(name, budget, policy, got, best) for policy, got in results.items()]
    return rows


def windows_of(params: Mapping[str, int], windows: int) -> Trace:
    """Return the pages that each epoch of the guest touches, one second apart, from page 0."""
    n_pages = params["pages"]
    trace = []
    for epoch in range(windows):
        bits = np.zeros(n_pages, dtype=bool)
        bits[hotcold_gfns(params, epoch) - params["gfn_start"]] = True
        trace.append((epoch * _SECOND_NS, pack(bits)))
    return trace


def _sum(
    workload: str, budget: float, policy: str, results: Sequence[ReplayResult], belady_refaults: int
) -> TraceRow:
    refaults = sum(result.refaults for result in results)
    return TraceRow(
        workload=workload,
        budget_share=budget,
        policy=policy,
        touches=sum(result.touches for result in results),
        refaults=refaults,
        refaults_of_belady_ratio=refaults / max(belady_refaults, 1),
        evictions=sum(result.evictions for result in results),
        wrong_evictions=sum(result.wrong_evictions for result in results),
        forced_evictions=sum(result.forced_evictions for result in results),
        swept_pages=sum(result.planned_pages for result in results),
        probed_pages=sum(result.probed_pages for result in results),
        policy_ms_per_window=sum(result.policy_ns for result in results) / results[0].windows / 1e6,
    )
