"""Part ``trace``, deterministic: windows computed from a seed, replayed through policies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
) -> list[dict[str, Any]]:
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
            best = _sum([belady(trace, share, budget_pages) for trace in traces])
            rows.append({"workload": name, "budget": budget, "policy": "belady", **best})
            for policy, make in _POLICIES.items():
                got = _sum([replay(t, make(share, t), budget_pages) for t in traces])
                rows.append({"workload": name, "budget": budget, "policy": policy, **got})
            for row in rows[-len(_POLICIES) - 1 :]:
                row["of_belady"] = row["refaults"] / max(best["refaults"], 1)
    return rows


def windows_of(params: Mapping[str, int], windows: int) -> Trace:
    """Return the pages that each epoch of the guest touches, one second apart, from page 0."""
    n_pages = params["pages"]
    trace = []
    for epoch in range(windows):
        bits = np.zeros(n_pages, dtype=bool)
        bits[hotcold_gfns(params, epoch) - params["start_gfn"]] = True
        trace.append((epoch * _SECOND_NS, pack(bits)))
    return trace


def _sum(results: Sequence[ReplayResult]) -> dict[str, Any]:
    def total(name: str) -> int:
        return functools.reduce(lambda so_far, r: so_far + int(getattr(r, name)), results, 0)

    windows = results[0].windows
    return {
        "touches": total("touches"),
        "refaults": total("refaults"),
        "evictions": total("evictions"),
        "wrong_evictions": total("wrong_evictions"),
        "forced_evictions": total("forced_evictions"),
        "swept_pages": total("planned_pages"),
        "probed_pages": total("probed_pages"),
        "policy_ms_per_window": total("policy_ns") / windows / 1e6,
    }
