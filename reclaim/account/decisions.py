"""Why: every decision of the daemon, the last ones in memory, all of them in a file if asked.

A decision is about pages of one VM (evicted, spared, brought back by the guest), about
how the daemon works (holding back, a new share of the budget), or about the daemon
itself (a VM dropped, a configuration taken). Its text is for people, its numbers for
programs. Pages are listed as runs ``[first gfn, how many]``.

The ring is bounded twice: by its number of decisions, and by the runs that all of them
list together; beyond that the oldest keep their counts and lose their lists.
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
from kvmhost.reclaim.errors import ConfigError
from kvmhost.reclaim.policy.base import Gfns

__all__ = ["Decision", "Decisions", "Kind", "Why", "to_runs"]

#: Runs that all decisions in the ring may list: 16 MiB.
_MAX_RUNS = 1 << 17


class Why(enum.IntEnum):
    """What made pages go; the number is what a page's history keeps."""

    NONE = 0
    BUDGET = 1  # above the high mark of the VM's budget
    CGROUP = 2  # near the limit of the memory cgroup
    TRIGGER = 3  # the kernel reported a stall
    PSI = 4  # ahead of need: nothing stalls
    PROMOTION = 5  # ahead of need: little comes back
    COMMAND = 6  # a person asked for it
    LIMIT = 7  # the VM's own fault handler, at its limit
    FORCED = 8  # above the limit, and the policy protected all that was left

    @property
    def text(self) -> str:
        """What a person reads."""
        return _TEXTS[self]


_TEXTS = {
    Why.NONE: "nothing happened to it yet",
    Why.BUDGET: "resident memory was above the high mark of the budget",
    Why.CGROUP: "the memory cgroup was near its limit",
    Why.TRIGGER: "the kernel reported tasks that stall for memory",
    Why.PSI: "ahead of need: stalls were below the target",
    Why.PROMOTION: "ahead of need: fewer pages came back than the target allows",
    Why.COMMAND: "a command asked for it",
    Why.LIMIT: "the VM's fault handler needed room at the resident limit",
    Why.FORCED: "above the limit, and the policy protected all that was left",
}


class Kind(enum.StrEnum):
    """What was decided."""

    EVICT = "evict"
    WOULD_EVICT = "would_evict"  # dry run
    FORCE = "force"  # the VM chose, at its limit
    SPARE = "spare"  # wanted, and not taken
    REFAULT = "refault"  # the guest brought evicted pages back
    HOLD = "hold"  # back-off began
    GO_ON = "go_on"  # and ended
    BUDGET = "budget"  # a VM's limit was set
    SKIP = "skip"  # no pass: the VM stands still
    ATTACH = "attach"
    DROP = "drop"
    RELOAD = "reload"
    COMMAND = "command"


class Decision(msgspec.Struct, frozen=True, omit_defaults=True):
    """One decision.

    :param number: counts from 1
    :param time_s: wall clock, since 1970
    :param mono_ns: monotonic clock
    :param vm: empty: none in particular
    :param why: name of a :class:`Why`, in lower case
    :param runs: ``[first gfn, pages]``, of the pages that it was about
    """

    number: int
    time_s: float
    mono_ns: int
    kind: Kind
    vm: str = ""
    passes: int = 0
    why: str = ""
    pages: int = 0
    text: str = ""
    runs: list[tuple[int, int]] = []

    def about(self, gfn: int) -> bool:
        """Return whether it lists a page."""
        return any(first <= gfn < first + n for first, n in self.runs)


class Decisions(Closing):
    """The last decisions, and a file of all. Safe for several threads.

    :param capacity: decisions kept in memory
    :param path: file that gets each as a JSON line, appended; empty: none
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
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
                self._fd = os.open(Path(path), flags, 0o600)
            except OSError as error:
                problem = f"{path}: {error.strerror}"
                raise ConfigError("flags", 0, "account.decisions_file", problem) from error

    def add(
        self,
        kind: Kind,
        text: str,
        *,
        vm: str = "",
        passes: int = 0,
        why: Why = Why.NONE,
        pages: int = 0,
        gfns: Gfns | None = None,
    ) -> Decision:
        """Take one down."""
        runs = [] if gfns is None else to_runs(gfns)
        with self._lock:
            decision = Decision(
                number=next(self._numbers),
                time_s=self._clock(),
                mono_ns=time.monotonic_ns(),
                kind=kind,
                vm=vm,
                passes=passes,
                why=why.name.lower() if why else "",
                pages=pages,
                text=text,
                runs=runs,
            )
            self._keep(decision)
            self._totals[vm, kind.value] += 1
        return decision

    def _keep(self, decision: Decision) -> None:
        if len(self._ring) == self._ring.maxlen:
            self._n_runs -= len(self._ring[0].runs)
        self._ring.append(decision)
        self._n_runs += len(decision.runs)
        for i in range(len(self._ring) - 1):
            if self._n_runs <= _MAX_RUNS:
                break
            old = self._ring[i]
            self._n_runs -= len(old.runs)
            self._ring[i] = msgspec.structs.replace(old, runs=[])
        if self._fd >= 0:
            self._write(decision)

    def _write(self, decision: Decision) -> None:
        # One write a line, in append mode: a daemon that is killed cuts no other's line,
        # and a full disk costs the account and not the guests.
        try:
            os.write(self._fd, msgspec.json.encode(decision) + b"\n")
        except OSError:
            self.write_errors += 1

    def last(
        self, n: int = 100, *, vm: str | None = None, gfn: int | None = None, after: int = 0
    ) -> list[Decision]:
        """Return up to ``n`` decisions, the oldest first.

        :param vm: of this VM only
        :param gfn: that list this page only
        :param after: with a larger number only
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
        """Yield (VM, kind, how many so far)."""
        with self._lock:
            counts = dict(self._totals)
        for (vm, kind), count in counts.items():
            yield vm, kind, count

    def forget(self, vm: str) -> None:
        """Stop to count a VM that is gone; what the ring has stays."""
        with self._lock:
            for key in [key for key in self._totals if key[0] == vm]:
                del self._totals[key]

    def close(self) -> None:
        """Close the file. Idempotent."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def to_runs(gfns: Gfns) -> list[tuple[int, int]]:
    """Return a list of pages as ascending runs of neighbours."""
    if not gfns.size:
        return []
    ordered = np.unique(gfns)
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 2) != 1)
    lengths = np.diff(starts, append=ordered.size)
    return list(zip(ordered[starts].tolist(), lengths.tolist(), strict=True))
