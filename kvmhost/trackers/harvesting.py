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
from kvmhost.trackers.sampling import DEFAULT_FRACTION, Sampler

if typing.TYPE_CHECKING:
    from kvmhost.machine.base import BaseMachine

__all__ = ["REARM", "Harvest", "Harvester"]

#: What may be re-armed after a harvest.
REARM = ("none", "young", "all", "sample")


@dataclasses.dataclass(frozen=True)
class Harvest:
    """What was young, and what finding it and re-arming took."""

    young: YoungBitmap
    harvest_ns: int
    rearm_ns: int


class Harvester:
    """Does the harvests of one machine; not for two threads at a time."""

    def __init__(self, machine: BaseMachine) -> None:
        self._machine, self._sampler = machine, Sampler()

    def harvest(
        self,
        gfn_start: int,
        n_pages: int,
        *,
        tracker: str = "auto",
        clear: bool = True,
        rearm: str = "young",
        fraction: float | None = None,
        mask: Words | None = None,
    ) -> Harvest:
        """Do one harvest.

        :param tracker: ``auto`` keeps the one in use: changing begins everything anew
        :param rearm: ``none``; ``young``, the pages that this cleared; ``all`` of the range;
            ``sample``, clear and re-arm a ``fraction`` only, other pages at each harvest
        :param fraction: with ``sample``, from 1/65536 to 1; None: a default that was measured
        :raises CapabilityError: if the tracker does not work here
        :raises LayoutError: if an argument is wrong
        """
        if rearm not in REARM:
            raise LayoutError(f"harvest: rearm {rearm!r}: need one of {', '.join(REARM)}")
        wanted = self._machine.tracker_name if tracker == "auto" else tracker
        source = self._machine.use_tracker(wanted or "auto")
        if rearm == "sample" and clear:
            sample = self._sampler.next_mask(gfn_start, n_pages, fraction or DEFAULT_FRACTION)
            mask = sample if mask is None else mask & sample
        start = time.perf_counter_ns()
        young = source.harvest(gfn_start, n_pages, clear, mask)
        middle = time.perf_counter_ns()
        if clear and self._machine.has_pager:
            self._machine.pager.note_young(young)
        if rearm == "all":
            source.rearm(gfn_start, n_pages)
        elif rearm != "none" and clear:
            cleared = young
            if mask is not None:
                cleared = dataclasses.replace(young, words=young.words & mask)
            source.rearm(gfn_start, n_pages, cleared)
        return Harvest(young, middle - start, time.perf_counter_ns() - middle)
