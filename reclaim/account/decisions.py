"""Decisions of the daemon with their reasons: the latest in memory, all in an optional file.

A decision is about pages of one VM (evicted, spared, refaulted), about the pace of the
daemon (holding back, a new share of the budget), or about the daemon itself (a VM
dropped, a configuration loaded). Its text is for people, its other fields for programs.
Pages are listed as runs ``[first gfn, number of pages]``.

The ring is bounded by its number of decisions and by the number of runs that they list
in total; beyond that, the oldest decisions keep their page counts but not their lists.
"""

from __future__ import annotations

import collections
import enum
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from kvmhost.closing import Closing
from kvmhost.errors import HostError, LayoutError
from kvmhost.files import open_log
from kvmhost.reclaim.errors import ConfigError
from kvmhost.reclaim.policy.base import Gfns

__all__ = ["Decision", "DecisionKind", "Decisions", "EvictReason", "SpareCause", "to_runs"]

#: Maximum number of runs in the ring, about 16 MiB.
_MAX_RUNS = 1 << 17


class EvictReason(enum.IntEnum):
    """Why pages were evicted; page histories store the number."""

    NONE = 0
    BUDGET = 1  # above the high mark of the VM's budget
    CGROUP = 2  # near the limit of the memory cgroup
    TRIGGER = 3  # the kernel reported a stall
    PSI = 4  # proactive: stalls are below the target
    PROMOTION = 5  # proactive: promotions are below the target
    COMMAND = 6  # a command
    LIMIT = 7  # the VM's own fault handler, at its limit
    FORCED = 8  # above the limit, and the policy protected all that was left

    @property
    def text(self) -> str:
        """The reason as a sentence."""
        return _TEXTS[self]


_TEXTS = {
    EvictReason.NONE: "never evicted",
    EvictReason.BUDGET: "resident memory was above the high mark of the budget",
    EvictReason.CGROUP: "the memory cgroup was near its limit",
    EvictReason.TRIGGER: "the kernel reported tasks that stall for memory",
    EvictReason.PSI: "proactive: stalls were below the target",
    EvictReason.PROMOTION: "proactive: the promotion rate was below the target",
    EvictReason.COMMAND: "requested by a command",
    EvictReason.LIMIT: "evicted by the VM's fault handler at the resident limit",
    EvictReason.FORCED: "above the limit, and the policy protected the remaining pages",
}


class DecisionKind(enum.StrEnum):
    """Kinds of decisions."""

    EVICT = "evict"
    WOULD_EVICT = "would_evict"  # dry run
    FORCE = "force"  # chosen by the VM at its limit
    SPARE = "spare"  # demanded but not evicted
    REFAULT = "refault"  # the guest accessed evicted pages
    HOLD = "hold"  # back-off began
    GO_ON = "go_on"  # back-off ended
    BUDGET = "budget"  # a VM's limit was set
    CLEAR = "clear"  # harvests clear another share of the pages, to bound the guest's loss
    SKIP = "skip"  # no pass: the VM is paused
    ATTACH = "attach"
    DROP = "drop"
    RELOAD = "reload"
    COMMAND = "command"


class SpareCause(enum.StrEnum):
    """Causes for which pages that were demanded are not evicted."""

    HOLDING = "holding"  # back-off, because evicted pages refault
    RATE_LIMIT = "rate_limit"  # pages or bytes per second
    PROTECTED = "protected"  # by the policy


class Decision(msgspec.Struct, frozen=True):
    """One decision."""

    number: int
    """its number, counted from 1"""
    time_s: float
    """wall clock, since 1970"""
    monotonic_ns: int
    """monotonic clock"""
    kind: DecisionKind
    """what was decided"""
    vm: str = ""
    """the VM; empty if it is about no particular one"""
    passes: int = 0
    """number of the VM's pass"""
    why: str = ""
    """the reason of an eviction, by name; else empty"""
    n_pages: int = 0
    """pages concerned"""
    text: str = ""
    """the reason in words, with figures"""
    ranges: list[tuple[int, int]] = []
    """the pages concerned, as pairs of gfn_start and n_pages; dropped first when memory is short"""

    def about(self, gfn: int) -> bool:
        """Return whether the decision lists a page."""
        return any(first <= gfn < first + n for first, n in self.ranges)


class Decisions(Closing):
    """The latest decisions, and an optional file of all of them. Thread-safe.

    :param capacity: decisions kept in memory
    :param path: file to which each is appended as a line of JSON; empty for none. It is
        made with mode 0600; a link, and a file of another user, are refused
    :raises ConfigError: if the file cannot be opened
    """

    def __init__(
        self, capacity: int = 4096, path: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        self._ring: collections.deque[Decision] = collections.deque(maxlen=capacity)
        self._clock = clock
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._n_runs = 0
        self._totals: collections.Counter[tuple[str, str]] = collections.Counter()
        self._fd = -1
        self.write_errors = 0
        if path:
            try:
                self._fd = open_log(Path(path), keep=True)
            except (HostError, LayoutError) as error:
                raise ConfigError("flags", 0, "account.decisions_file", str(error)) from error

    def add(
        self,
        kind: DecisionKind,
        text: str,
        *,
        vm: str = "",
        passes: int = 0,
        why: EvictReason = EvictReason.NONE,
        pages: int = 0,
        gfns: Gfns | None = None,
    ) -> Decision:
        """Record a decision."""
        runs = [] if gfns is None else to_runs(gfns)
        with self._lock:
            decision = Decision(
                number=next(self._numbers),
                time_s=self._clock(),
                monotonic_ns=time.monotonic_ns(),
                kind=kind,
                vm=vm,
                passes=passes,
                why=why.name.lower() if why else "",
                n_pages=pages,
                text=text,
                ranges=runs,
            )
            self._keep(decision)
            self._totals[vm, kind.value] += 1
        return decision

    def _keep(self, decision: Decision) -> None:
        if len(self._ring) == self._ring.maxlen:
            self._n_runs -= len(self._ring[0].ranges)
        self._ring.append(decision)
        self._n_runs += len(decision.ranges)
        for i in range(len(self._ring) - 1):
            if self._n_runs <= _MAX_RUNS:
                break
            old = self._ring[i]
            self._n_runs -= len(old.ranges)
            self._ring[i] = msgspec.structs.replace(old, ranges=[])
        if self._fd >= 0:
            self._write(decision)

    def _write(self, decision: Decision) -> None:
        # One write per line in append mode: a killed daemon truncates no other line, and
        # a full disk loses decisions but does not stop the daemon.
        try:
            os.write(self._fd, msgspec.json.encode(decision) + b"\n")
        except OSError:
            self.write_errors += 1

    def last(
        self, n: int = 100, *, vm: str | None = None, gfn: int | None = None, after: int = 0
    ) -> list[Decision]:
        """Return up to ``n`` decisions, the oldest first.

        :param vm: only decisions about this VM
        :param gfn: only decisions that list this page
        :param after: only decisions with a larger number
        """
        with self._lock:
            ring = list(self._ring)
        found = [
            decision
            for decision in ring
            if decision.number > after
            and (vm is None or decision.vm == vm)
            and (gfn is None or decision.about(gfn))
        ]
        return found[-n:]

    def totals(self) -> Iterator[tuple[str, str, int]]:
        """Yield (VM, kind, number of decisions)."""
        with self._lock:
            counts = dict(self._totals)
        for (vm, kind), count in counts.items():
            yield vm, kind, count

    def forget(self, vm: str) -> None:
        """Drop the totals of a VM; its decisions stay in the ring."""
        with self._lock:
            for key in [key for key in self._totals if key[0] == vm]:
                del self._totals[key]

    def close(self) -> None:
        """Close the file. Idempotent."""
        with self._lock:
            if self._fd >= 0:
                fd, self._fd = self._fd, -1
                os.close(fd)


def to_runs(gfns: Gfns) -> list[tuple[int, int]]:
    """Return pages as ascending runs of consecutive gfns."""
    if not gfns.size:
        return []
    ordered = np.unique(gfns)
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 2) != 1)
    lengths = np.diff(starts, append=ordered.size)
    return list(zip(ordered[starts].tolist(), lengths.tolist(), strict=True))
