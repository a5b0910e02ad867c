"""Exploration of every interleaving of a few actors' steps.

An actor is a list of steps; a step changes the shared state, or reports that it is
blocked (on a lock that another actor holds). The explorer runs the steps in every
possible order and checks the state at the end of each. States that are reached again are
not explored again, but their schedules are counted, so the number of schedules is the
true one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

__all__ = ["BLOCKED", "Report", "State", "explore"]

State = dict[str, Any]  # the values must be hashable


class _Blocked:
    """Returned by a step that cannot be taken in this state."""


BLOCKED = _Blocked()

Step = Callable[[State], object]


@dataclasses.dataclass(frozen=True)
class Report:
    """What an exploration found.

    ``schedules`` is the number of complete interleavings; ``failed`` how many of them end
    in a state that the check rejects; ``example`` is one of those, as ``actor: step`` names.
    """

    schedules: int
    states: int
    failed: int
    deadlocks: int
    example: tuple[str, ...] = ()


def explore(
    state: State,
    actors: Mapping[str, Sequence[Step]],
    check: Callable[[State], bool],
) -> Report:
    """Take the actors' steps in every order.

    A step gets a copy of the state that it may change. It returns None to continue, an
    integer to continue at that step of its actor (a retry), or :data:`BLOCKED`. Loops
    must make progress: a step that goes back without having changed anything is an
    endless schedule.

    :param check: is the state at the end of a schedule right?
    :raises RecursionError: if a schedule has no end
    """
    names = list(actors)
    memo: dict[tuple[Hashable, ...], tuple[int, int, int, tuple[str, ...]]] = {}
    running: set[tuple[Hashable, ...]] = set()

    def visit(now: State, at: tuple[int, ...]) -> tuple[int, int, int, tuple[str, ...]]:
        key = (tuple(sorted(now.items())), at)
        if key in memo:
            return memo[key]
        if key in running:
            raise RecursionError(f"endless schedule through {now}")
        running.add(key)
        total, failed, stuck = 0, 0, 0
        example: tuple[str, ...] = ()
        moved = False
        for i, name in enumerate(names):
            if at[i] >= len(actors[name]):
                continue
            after = dict(now)
            step = actors[name][at[i]]
            result = step(after)
            if isinstance(result, _Blocked):
                continue
            moved = True
            next_at = result if isinstance(result, int) else at[i] + 1
            t, f, s, e = visit(after, (*at[:i], next_at, *at[i + 1 :]))
            total, failed, stuck = total + t, failed + f, stuck + s
            if e and not example:
                example = (f"{name}: {getattr(step, '__name__', step)}", *e)
        if not moved:
            done = all(at[i] >= len(actors[n]) for i, n in enumerate(names))
            bad = done and not check(now)
            total, failed, stuck = 1, int(bad), int(not done)
            example = ("end",) if bad or not done else ()
        running.discard(key)
        memo[key] = (total, failed, stuck, example)
        return memo[key]

    total, failed, stuck, example = visit(dict(state), (0,) * len(names))
    return Report(total, len(memo), failed, stuck, example)
