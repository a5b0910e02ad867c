"""Replay a recorded run through a policy under a budget.

The model of one window, which is also the model of Belady's optimal policy
(:mod:`kvmhost.reclaim.policy.belady`):

1. every page that was young in the window is touched once: it is resident or becomes
   resident, which is a refault if it was evicted before;
2. the policy runs one pass with the accessed bits that its plan requested; other bits
   stay set, and the policy's probe finds them;
3. pages in excess of the budget are evicted: the policy's victims and, if the policy
   protects too many pages, further pages by a fixed rule (forced, as a VM does at its
   limit): those young in the fewest of the last eight windows, then by gfn.

So resident memory may exceed the budget during a window. A bitmap does not contain the
order of touches within a window, and the result does not depend on it.

An eviction is wrong if the page refaults within :data:`WRONG_WITHIN` windows.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, n_words, pack, unpack
from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy.base import Gfns, Mask, Policy, check_words

__all__ = ["TABLE_PAGES", "WRONG_WITHIN", "ReplayResult", "Windows", "replay", "tables_of"]

#: Pages mapped by one leaf table.
TABLE_PAGES = 512
#: An eviction is wrong if the page refaults within this number of windows.
WRONG_WITHIN = 4

#: (end of the window in ns, its young pages as words from gfn 0), in order of time.
Windows = Iterable[tuple[int, Words]]


@dataclasses.dataclass(frozen=True, eq=False)
class ReplayResult:
    """The result of a replay, in pages.

    :param first_touches: became resident for the first time, which no policy can avoid
    :param wrong_evictions: refaulted within :data:`WRONG_WITHIN` windows
    :param forced_evictions: the part of the evictions that the policy did not select
    :param probed_pages: accessed bits tested between harvests
    :param planned_pages: accessed bits that the policy's plans requested
    :param resident: after each window, ``int64``
    :param refaults_by_window: ``int64``
    :param policy_ns: processor time inside the policy; the only field that is measured
    """

    policy: str
    budget_pages: int
    windows: int
    touches: int
    first_touches: int
    refaults: int
    evictions: int
    wrong_evictions: int
    forced_evictions: int
    probed_pages: int
    planned_pages: int
    resident: npt.NDArray[np.int64]
    refaults_by_window: npt.NDArray[np.int64]
    policy_ns: int

    @property
    def hit_ratio(self) -> float:
        """Share of touches, except first touches, that found their page resident."""
        return 1 - self.refaults / max(self.touches - self.first_touches, 1)


def replay(windows: Windows, policy: Policy, budget_pages: int) -> ReplayResult:
    """Replay windows through a policy under a budget.

    :param windows: see :data:`Windows`; any iterable, read once
    :param policy: a new policy, for as many pages as the words have bits
    :raises LayoutError: if words do not fit the policy's pages, or times are not ascending
    """
    if budget_pages < 1:
        raise LayoutError(f"replay: a budget of {budget_pages} pages")
    run = _Run(policy, budget_pages)
    for now_ns, young in windows:
        run.window(now_ns, young)
    return run.result()


def tables_of(words: Words) -> Words:
    """Return one bit per table of 512 pages: whether the bit of any of its pages is set."""
    padded = np.zeros(-(-words.size // 8) * 8, dtype=np.uint64)
    padded[: words.size] = words
    return pack(np.any(padded.reshape(-1, 8) != 0, axis=1))


class _Run:
    """One replay: the state of the pages, their accessed bits, and the counts so far."""

    def __init__(self, policy: Policy, budget_pages: int) -> None:
        n_pages = policy.n_pages
        self.policy, self.budget_pages, self.n_pages = policy, budget_pages, n_pages
        self.resident: Mask = np.zeros(n_pages, dtype=bool)
        self.accessed: Words = np.zeros(n_words(n_pages), dtype=np.uint64)
        #: Window of the last eviction of pages that are not resident; -1: never evicted.
        self.went = np.full(n_pages, -1, dtype=np.int32)
        #: One bit for each of the last eight windows.
        self.seen = np.zeros(n_pages, dtype=np.uint8)
        self.number = 0
        self.now_ns = -1
        self.counts = dict.fromkeys(
            ("touches", "first_touches", "evictions", "wrong", "forced", "probed", "planned"), 0
        )
        self.policy_ns = 0
        self.curve: list[int] = []
        self.refaults: list[int] = []

    def window(self, now_ns: int, young: Words) -> None:
        check_words(young, self.n_pages)
        if now_ns < self.now_ns:
            raise LayoutError(f"replay: window {self.number} ends at {now_ns} ns, before the last")
        self.now_ns = now_ns
        touched = unpack(young, self.n_pages)
        came = self._touch(touched)
        self.accessed |= young
        start = time.thread_time_ns()
        self._pass(came)
        excess = int(self.resident.sum()) - self.budget_pages
        victims = self._victims(excess) if excess > 0 else np.empty(0, dtype=np.int64)
        self.policy_ns += time.thread_time_ns() - start
        self._evict(victims, excess)
        self.curve.append(int(self.resident.sum()))
        self.number += 1

    def _touch(self, touched: Mask) -> Gfns:
        came = np.flatnonzero(touched & ~self.resident)
        back = self.went[came] >= 0
        recent = self.number - self.went[came[back]] <= WRONG_WITHIN
        self.counts["touches"] += int(touched.sum())
        self.counts["first_touches"] += int(came.size - back.sum())
        self.counts["wrong"] += int(recent.sum())
        self.refaults.append(int(back.sum()))
        self.resident[came] = True
        self.seen >>= 1
        self.seen[touched] |= 128
        return came

    def _pass(self, came: Gfns) -> None:
        plan = self.policy.plan(tables_of(self.accessed))
        if plan.pages is None:
            young, self.accessed = self.accessed, np.zeros_like(self.accessed)
            self.counts["planned"] += self.n_pages
        else:
            check_words(plan.pages, self.n_pages)
            young = self.accessed & plan.pages
            self.accessed = self.accessed & ~plan.pages
            self.counts["planned"] += int(unpack(plan.pages, self.n_pages).sum())
        self.policy.refaulted(came, self.now_ns)
        self.policy.age(young, self.now_ns)

    def _victims(self, excess: int) -> Gfns:
        victims = self.policy.victims(excess, self.resident.copy(), self.now_ns, self)
        if victims.size > excess or np.unique(victims).size != victims.size:
            raise LayoutError(
                f"{self.policy.name}: {victims.size} victims of {excess}, or twice one"
            )
        if not self.resident[victims].all():
            raise LayoutError(f"{self.policy.name}: a victim was not a candidate")
        return victims

    def _evict(self, victims: Gfns, excess: int) -> None:
        self._take(victims)
        short = excess - victims.size
        if short > 0:
            left = np.flatnonzero(self.resident)
            windows_seen = np.unpackbits(self.seen[left][:, None], axis=1).sum(axis=1)
            self._take(left[np.argsort(windows_seen, kind="stable")[:short]])
            self.counts["forced"] += short

    def _take(self, gfns: Gfns) -> None:
        if not gfns.size:
            return
        self.resident[gfns] = False
        self.went[gfns] = self.number
        self.counts["evictions"] += gfns.size
        # A page that is not resident has no accessed bit.
        gone = np.zeros(self.n_pages, dtype=bool)
        gone[gfns] = True
        self.accessed &= ~pack(gone)
        self.policy.evicted(gfns, self.now_ns)

    # -- the probe -------------------------------------------------------------

    def clear_young(self, pages: Words) -> Words:
        found = self.accessed & pages
        self.accessed = self.accessed & ~pages
        self.counts["probed"] += int(unpack(pages, self.n_pages).sum())
        return found

    def clear_flush_young(self, gfn: int) -> bool:
        bit = np.uint64(1 << gfn % 64)
        young = bool(self.accessed[gfn // 64] & bit)
        self.accessed[gfn // 64] &= ~bit
        self.counts["probed"] += 1
        return young

    def result(self) -> ReplayResult:
        counts = self.counts
        return ReplayResult(
            policy=self.policy.name,
            budget_pages=self.budget_pages,
            windows=self.number,
            touches=counts["touches"],
            first_touches=counts["first_touches"],
            refaults=sum(self.refaults),
            evictions=counts["evictions"],
            wrong_evictions=counts["wrong"],
            forced_evictions=counts["forced"],
            probed_pages=counts["probed"],
            planned_pages=counts["planned"],
            resident=np.array(self.curve, dtype=np.int64),
            refaults_by_window=np.array(self.refaults, dtype=np.int64),
            policy_ns=self.policy_ns,
        )
