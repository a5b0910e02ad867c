"""The time axis of a record, which is monotonic even if the clocks were not.

Monotonic times are comparable within one boot of a host. Between boots the time that
passed is taken from the wall clock. If that is unknown too, a window counts with its
planned length.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt

from kvmhost.reclaim.record.reader import YoungRecord

__all__ = [
    "GAP_SHARE",
    "Coverage",
    "Jump",
    "coverage_of",
    "elapsed_s",
    "find_jumps",
    "interval_s",
    "lengths_s",
    "starts_s",
    "weighted_mean",
]

#: Clocks that differ by less than this over a window have not jumped.
_SLACK_NS = 1_000_000_000
#: Minimum length of a gap, as a share of a window.
GAP_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Jump:
    """A difference between the clocks over the time since the end of the previous window."""

    window: int
    monotonic_s: float
    wall_s: float


def interval_s(record: YoungRecord) -> float:
    """Return the planned length of a window, or else the median of the actual lengths."""
    planned = [s.interval_ns for s in record.metadata.sessions if s.interval_ns]
    if planned:
        return planned[-1] / 1e9
    steps = np.diff(record.column("end_ns"))
    steps = steps[steps > 0]
    return float(np.median(steps)) / 1e9 if steps.size else 1.0


def elapsed_s(record: YoungRecord) -> npt.NDArray[np.float64]:
    """Return shape ``(windows,)``: the end of each window, from the start of the first."""
    if not len(record):
        return np.zeros(0)
    planned = round(interval_s(record) * 1e9)
    steps, wall, same_boot = _steps(record)
    wall_step = np.where(wall > 0, wall, planned)
    steps = np.where(same_boot & (steps > 0), steps, wall_step)
    start, end = int(record.column("start_ns")[0]), int(record.column("end_ns")[0])
    first = end - start if 0 < start < end else planned
    return np.concatenate([[first], first + np.cumsum(steps)]) / 1e9


def starts_s(record: YoungRecord) -> npt.NDArray[np.float64]:
    """Return shape ``(windows,)``: the start of each window, on the axis of :func:`elapsed_s`.

    A window whose start is unknown begins where the one before it ended.
    """
    ends = elapsed_s(record)
    start_ns, end_ns = record.column("start_ns"), record.column("end_ns")
    before = np.concatenate([[0.0], ends[:-1]])[: ends.size]
    known = (start_ns > 0) & (end_ns > start_ns)
    starts = np.maximum(before, ends - (end_ns - start_ns) / 1e9)
    return np.where(known, starts, before)


def lengths_s(record: YoungRecord) -> npt.NDArray[np.float64]:
    """Return shape ``(windows,)``: the time that each window covers, without gaps."""
    return elapsed_s(record) - starts_s(record)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How much of a time the windows cover; outside of them no touch was seen.

    :param elapsed_s: from the start of the first window to the end of the last
    :param n_gaps: gaps longer than :data:`GAP_SHARE` of a window
    """

    covered_s: float
    elapsed_s: float
    n_gaps: int

    @property
    def share(self) -> float:
        """Covered share of the time; 1 if there is none."""
        return min(self.covered_s / self.elapsed_s, 1.0) if self.elapsed_s > 0 else 1.0

    @property
    def text(self) -> str:
        """Return what is to be said beside results; empty if nothing is missing."""
        if not self.n_gaps:
            return ""
        percent = min(round(100 * self.share), 99)
        gaps = "1 gap" if self.n_gaps == 1 else f"{self.n_gaps:,} gaps"
        return f"covered {percent} % of {self.elapsed_s:.1f} s ({gaps})"


def coverage_of(record: YoungRecord, first: int = 0, end: int | None = None) -> Coverage:
    """Return the coverage of windows ``[first, end)``."""
    starts, ends = starts_s(record)[first:end], elapsed_s(record)[first:end]
    if not ends.size:
        return Coverage(0.0, 0.0, 0)
    gaps = starts[1:] - ends[:-1] > GAP_SHARE * interval_s(record)
    covered = float((ends - starts).sum())
    return Coverage(covered, float(ends[-1] - starts[0]), int(gaps.sum()))


def weighted_mean(
    values: npt.NDArray[np.generic], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the mean along the first axis; every value counts alike if all weights are 0.

    :param weights: shape ``(n,)``, such as :func:`lengths_s`
    """
    if not weights.sum() > 0:
        weights = np.ones(weights.size)
    return np.average(np.asarray(values, dtype=np.float64), axis=0, weights=weights)


def find_jumps(record: YoungRecord) -> list[Jump]:
    """Return where the clocks differ by more than a second, or one of them went backwards."""
    steps, wall, same_boot = _steps(record)
    odd = ~same_boot | (steps < 0) | ((wall != 0) & (np.abs(steps - wall) > _SLACK_NS))
    return [
        Jump(int(at) + 1, float(steps[at]) / 1e9, float(wall[at]) / 1e9)
        for at in np.flatnonzero(odd)
    ]


def _steps(
    record: YoungRecord,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return how far each clock advanced per window, and which neighbours share a boot.

    A step of the wall clock is 0 where it is unknown.
    """
    wall = record.column("wall_ns")
    known = (wall[1:] > 0) & (wall[:-1] > 0)
    same_boot = np.ones(max(len(record) - 1, 0), dtype=bool)
    sessions = record.metadata.sessions
    for before, after in itertools.pairwise(sessions):
        if before.boot_id != after.boot_id and 0 < after.first_window < len(record):
            same_boot[after.first_window - 1] = False
    return np.diff(record.column("end_ns")), np.where(known, np.diff(wall), 0), same_boot
