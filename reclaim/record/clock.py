"""The time axis of a record: one that only goes forward, whatever the clocks did.

Monotonic times of one boot of a host compare; those of two do not, and between them
the wall clock has to say how much time passed. Where it does not know either, the
window counts as long as was planned.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt

from kvmhost.reclaim.record.reader import YoungRecord

__all__ = ["Jump", "elapsed_s", "find_jumps", "interval_s"]

#: Clocks that differ by less over a window have not jumped.
_SLACK_NS = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class Jump:
    """Clocks that disagree between the end of a window and the end of the one before."""

    window: int
    monotonic_s: float
    wall_s: float


def interval_s(record: YoungRecord) -> float:
    """Return the length of a window: what was planned, else the median of what was."""
    planned = [s.interval_ns for s in record.metadata.sessions if s.interval_ns]
    if planned:
        return planned[-1] / 1e9
    steps = np.diff(record.column("end_ns"))
    steps = steps[steps > 0]
    return float(np.median(steps)) / 1e9 if steps.size else 1.0


def elapsed_s(record: YoungRecord) -> npt.NDArray[np.float64]:
    """Return shape ``(windows,)``: when each window ended, from the start of the first."""
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
    """Return where the clocks disagree by more than a second, or one went back."""
    steps, wall, same_boot = _steps(record)
    odd = ~same_boot | (steps < 0) | ((wall != 0) & (np.abs(steps - wall) > _SLACK_NS))
    return [
        Jump(int(at) + 1, float(steps[at]) / 1e9, float(wall[at]) / 1e9)
        for at in np.flatnonzero(odd)
    ]


def _steps(
    record: YoungRecord,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return by how much each clock went on from window to window, and where boots match.

    A step of the wall clock is 0 where it was not known.
    """
    wall = record.column("wall_ns")
    known = (wall[1:] > 0) & (wall[:-1] > 0)
    same_boot = np.ones(max(len(record) - 1, 0), dtype=bool)
    sessions = record.metadata.sessions
    for before, after in itertools.pairwise(sessions):
        if before.boot_id != after.boot_id and 0 < after.first_window < len(record):
            same_boot[after.first_window - 1] = False
    return np.diff(record.column("end_ns")), np.where(known, np.diff(wall), 0), same_boot
