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

__all__ = ["Jump", "elapsed_s", "find_jumps", "interval_s"]

#: Clocks that differ by less than this over a window have not jumped.
_SLACK_NS = 1_000_000_000


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
