"""The workloads of the comparison, as parameters of the guest ``hotcold``.

A window of a trace is one epoch of the guest. The number of touches per window determines
how much a policy can learn: the sparser the touches, the more Belady's optimum gains from
knowing each draw, which no policy can know. ``hotcold`` and ``zipf`` represent a guest that
touches one cold page, or four pages, for each page of its memory between two passes (a
1 GiB guest with a million touches per second, harvested once per second); the ``sparse``
workloads represent sixteen to sixty-four times fewer touches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

__all__ = ["BUDGETS", "WORKLOADS", "ReclaimWorkload", "guest_params"]

#: Budgets as shares of the touched memory.
BUDGETS = (0.75, 0.5, 0.25)

Params = Mapping[str, int]

_PLAIN: Params = {
    "gfn_start": 1024,
    "hot": 0,
    "cold": 0,
    "scan_every": 0,
    "scan_epochs": 16,
    "write_permille": 500,
    "same_filled_permille": 250,
    "seed": 1,
    "passes": 1,
    "zipf": 0,
    "zipf_permille": 900,
    "phase_every": 0,
    "phase_step": 0,
}


@dataclasses.dataclass(frozen=True)
class ReclaimWorkload:
    """One or several guests.

    :param guests: functions that return the parameters of each guest for a number of pages
    """

    name: str
    about: str
    guests: tuple[Callable[[int], Params], ...]


def guest_params(guest: Callable[[int], Params], pages: int) -> dict[str, int]:
    """Return all parameters of a guest with ``pages`` pages."""
    return {**_PLAIN, "pages": pages, **guest(pages)}


def _hotcold(pages: int) -> Params:
    return {"hot": pages // 4, "cold": pages}


def _zipf(pages: int) -> Params:
    return {"zipf": 4 * pages}


_ALL = (
    ReclaimWorkload("hotcold", "a quarter hot, cold touches all over", (_hotcold,)),
    ReclaimWorkload("zipf", "zipf 0.9", (_zipf,)),
    ReclaimWorkload(
        "scan",
        "a quarter hot, a scan over everything now and then",
        (lambda p: {"hot": p // 4, "cold": p // 128, "scan_every": 64},),
    ),
    ReclaimWorkload(
        "phase",
        "a fifth hot, another fifth every 40 windows",
        (lambda p: {"hot": p // 5, "cold": p // 128, "phase_every": 40, "phase_step": p // 5},),
    ),
    ReclaimWorkload(
        "two", "two guests: hotcold and zipf, a half of the budget each", (_hotcold, _zipf)
    ),
    ReclaimWorkload(
        "hotcold-sparse",
        "hotcold with a 64th of the cold touches",
        (lambda p: {"hot": p // 4, "cold": p // 64},),
    ),
    ReclaimWorkload(
        "zipf-sparse", "zipf with a 16th of the touches", (lambda p: {"zipf": p // 4},)
    ),
)
WORKLOADS = {workload.name: workload for workload in _ALL}
