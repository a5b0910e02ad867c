"""One harvest of a machine, whoever asks: find, clear, tell the pager, re-arm.

The order matters. The pager hears of young pages before they are re-armed, so that its
clock hand never takes a page for old that was just seen; and only pages whose bit was
cleared are re-armed, since that is where the guest pays.
"""

from __future__ import annotations

import dataclasses
import time
import typing

from kvmhost.bitmap import Words, YoungBitmap
from kvmhost.errors import LayoutError

if typing.TYPE_CHECKING:
    from kvmhost.machine import Machine

__all__ = ["REARM", "Harvest", "harvest_machine"]

#: What may be re-armed after a harvest.
REARM = ("none", "young", "all")


@dataclasses.dataclass(frozen=True)
class Harvest:
    """What was young, and what finding it and re-arming took."""

    young: YoungBitmap
    harvest_ns: int
    rearm_ns: int


def harvest_machine(
    machine: Machine,
    gfn_start: int,
    n_pages: int,
    *,
    tracker: str = "auto",
    clear: bool = True,
    rearm: str = "young",
    mask: Words | None = None,
) -> Harvest:
    """Do one harvest; not for two threads at a time.

    :param tracker: ``auto`` keeps the one in use: changing begins everything anew
    :param rearm: ``none``, ``young`` (the pages that this cleared) or ``all`` of the range
    """
    if rearm not in REARM:
        raise LayoutError(f"harvest: rearm {rearm!r}: need one of {', '.join(REARM)}")
    wanted = machine.tracker_name if tracker == "auto" else tracker
    source = machine.use_tracker(wanted or "auto")
    start = time.perf_counter_ns()
    young = source.harvest(gfn_start, n_pages, clear, mask)
    middle = time.perf_counter_ns()
    if clear and machine.has_pager:
        machine.pager.note_young(young)
    if rearm == "all":
        source.rearm(gfn_start, n_pages)
    elif rearm == "young" and clear:
        cleared = young
        if mask is not None:
            cleared = dataclasses.replace(young, words=young.words & mask)
        source.rearm(gfn_start, n_pages, cleared)
    return Harvest(young, middle - start, time.perf_counter_ns() - middle)
