"""Replay records through policies with many combinations of parameters, in parallel.

One case is a record, a policy with its options, and a budget. Cases are independent and
run on Dask workers: processes on this machine by default, or a cluster whose workers
have the records under the same paths. A window is modelled as in
:mod:`kvmhost.reclaim.policy.replay`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvmhost.bitmap import Words, n_words
from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.installing import install_hint
from kvmhost.reclaim.policy import registry
from kvmhost.reclaim.policy.base import Policy
from kvmhost.reclaim.policy.replay import replay
from kvmhost.reclaim.record.clock import elapsed_s, lengths_s, weighted_mean
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.young.bits import count_bits

__all__ = [
    "Case",
    "Outcome",
    "cases_of",
    "has_dask",
    "make_policy",
    "run_case",
    "run_cases",
    "windows_of",
]


@dataclasses.dataclass(frozen=True)
class Case:
    """One replay. Options are (name, value) pairs, so that cases are comparable."""

    path: Path
    policy: str
    budget_pages: int
    options: tuple[tuple[str, Any], ...] = ()
    first: int = 0
    end: int | None = None

    def settings(self) -> str:
        """Return policy and options as text."""
        return " ".join([self.policy, *(f"{name}={value}" for name, value in self.options)])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a case.

    :param minutes: the time that the windows cover
    :param refaults_per_min: predicted refaults of evicted pages
    :param saved_pages: mean over that time of pages touched so far and not resident
    :param saved_share: the same as a share of the pages touched so far
    :param wrong_share: share of evictions that refaulted within a few windows
    """

    case: Case
    windows: int
    minutes: float
    touches: int
    refaults: int
    refaults_per_min: float
    refault_share: float
    evictions: int
    forced_evictions: int
    wrong_share: float
    saved_pages: float
    saved_share: float
    policy_s: float


def cases_of(
    paths: Sequence[Path],
    policies: Sequence[str],
    budgets: Sequence[Callable[[YoungRecord], int]],
    grid: Mapping[str, Sequence[Any]],
    windows: tuple[int | None, int | None] = (None, None),
) -> list[Case]:
    """Return a case for every combination.

    :param budgets: functions that return the budget in pages for a record
    :param grid: option name to values
    :raises LayoutError: if a budget is below one page, or a policy lacks an option
    """
    found = []
    for path in paths:
        with YoungRecord.open(path) as record:
            pages = [budget(record) for budget in budgets]
            first, end, _ = slice(*windows).indices(len(record))
            n_pages, where = record.n_pages, record.path
        if min(pages, default=1) < 1:
            raise LayoutError(f"{path}: a budget of {min(pages)} pages")
        values = [[(name, value) for value in grid[name]] for name in grid]
        for policy, options, budget in itertools.product(
            policies, itertools.product(*values), pages
        ):
            make_policy(policy, max(n_pages, 1), dict(options))
            found.append(Case(where.resolve(), policy, budget, options, first, end))
    return found


def make_policy(name: str, n_pages: int, options: Mapping[str, Any]) -> Policy:
    """Create a policy.

    :raises LayoutError: if the name or an option is unknown
    """
    return registry.create(name, n_pages, options)


def windows_of(record: YoungRecord, first: int, end: int | None) -> Iterator[tuple[int, Words]]:
    """Yield (end in ns, bitmap over all pages of the record), the input of a replay."""
    times = elapsed_s(record) * 1e9
    words = n_words(record.n_pages)
    for number, bitmap in enumerate(record.bitmaps(first, end), first):
        whole = np.zeros(words, dtype=np.uint64)
        whole[: bitmap.words.size] = bitmap.words
        yield int(times[number]), whole


def run_case(case: Case) -> Outcome:
    """Replay one case, in this process.

    :raises RecordError: if the record is damaged
    """
    with YoungRecord.open(case.path) as record:
        policy = make_policy(case.policy, max(record.n_pages, 1), dict(case.options))
        result = replay(windows_of(record, case.first, case.end), policy, case.budget_pages)
        lengths = lengths_s(record)[case.first : case.end]
        minutes = float(lengths.sum()) / 60
        ever = _touched_so_far(record, case.first, case.end)
    held = np.maximum(ever - result.resident, 0)
    return Outcome(
        case=case,
        windows=result.windows,
        minutes=minutes,
        touches=result.touches,
        refaults=result.refaults,
        refaults_per_min=result.refaults / minutes if minutes else 0.0,
        refault_share=result.refaults / max(result.touches - result.first_touches, 1),
        evictions=result.evictions,
        forced_evictions=result.forced_evictions,
        wrong_share=result.wrong_evictions / max(result.evictions, 1),
        saved_pages=float(weighted_mean(held, lengths)) if held.size else 0.0,
        saved_share=float(weighted_mean(held / np.maximum(ever, 1), lengths)) if held.size else 0.0,
        policy_s=result.policy_ns / 1e9,
    )


def run_cases(
    cases: Sequence[Case],
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Run cases in parallel; return their outcomes in the same order.

    :param workers: processes on this machine; 0 runs in this process, without Dask; None
        for one per core
    :param scheduler: address of a Dask cluster; its workers need the records and this package
    :raises CapabilityError: without Dask, or if the scheduler does not respond
    """
    if workers == 0 and scheduler is None:
        outcomes = []
        for case in cases:
            outcomes.append(run_case(case))
            on_done()
        return outcomes
    distributed = _need_dask()
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(_client(distributed, workers, scheduler, stack))
        # pure=False: equal cases are run separately.
        futures = client.map(run_case, cases, pure=False)
        for _ in distributed.as_completed(futures):
            on_done()
        found: list[Outcome] = client.gather(futures)
        return found


def _client(
    distributed: Any, workers: int | None, scheduler: str | None, stack: contextlib.ExitStack
) -> Any:
    if scheduler is None:
        return distributed.Client(stack.enter_context(_local_cluster(distributed, workers)))
    try:
        return distributed.Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise CapabilityError(
            "scheduler", f"a Dask scheduler at {scheduler}", str(error),
            "start one with dask scheduler, and workers with dask worker",
        ) from error  # fmt: skip


def _local_cluster(distributed: Any, workers: int | None) -> Any:
    """Start worker processes on this machine.

    :raises CapabilityError: if they do not start, for example under a limit of memory
    """
    try:
        # Workers that cannot start write tracebacks to the descriptor that they inherit.
        with _discarded_stderr():
            return distributed.LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
            )
    except (RuntimeError, OSError, MemoryError) as error:
        raise CapabilityError(
            "parallel replay", "worker processes", f"which did not start ({error})",
            "raise the limits on memory and processes (ulimit -v, ulimit -u), or use --workers 0",
        ) from error  # fmt: skip


@contextlib.contextmanager
def _discarded_stderr() -> Iterator[None]:
    """Send what is written to descriptor 2, also by child processes, to /dev/null."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def has_dask() -> bool:
    """Return whether Dask is installed."""
    return importlib.util.find_spec("distributed") is not None


def _need_dask() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise CapabilityError(
            "fleet", "dask[distributed]", str(error),
            f'{install_hint("fleet")}; or use --workers 0',
        ) from error  # fmt: skip
    return distributed


def _touched_so_far(record: YoungRecord, first: int, end: int | None) -> np.ndarray[Any, Any]:
    """Return shape ``(windows,)``: pages that were young since the first window."""
    seen = np.zeros(n_words(record.n_pages), dtype=np.uint64)
    found = []
    for bitmap in record.bitmaps(first, end):
        seen[: bitmap.words.size] |= bitmap.words
        found.append(int(count_bits(seen).sum(dtype=np.int64)))
    return np.array(found, dtype=np.int64)
