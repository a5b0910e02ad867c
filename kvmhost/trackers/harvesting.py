"""Harvests of one VM: find young pages, clear them, inform the pager, re-arm.

The order matters. The pager receives the young pages before they are re-armed, so that its
clock hand never treats a page that was just found young as old; and only pages whose bit
was cleared are re-armed, since re-arming costs the guest a fault.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Literal, get_args

from kvmhost.bitmap import Words, YoungBitmap
from kvmhost.errors import LayoutError, StateError
from kvmhost.trackers import registry
from kvmhost.trackers.base import TrackedVm, Tracker, check_mask, check_range
from kvmhost.trackers.sampling import DEFAULT_FRACTION, Sampler, period_of

__all__ = ["REARM", "Harvest", "Harvester", "Rearm"]

#: Pages to re-arm after a harvest.
Rearm = Literal["none", "young", "all", "sample"]
REARM: tuple[Rearm, ...] = get_args(Rearm)


@dataclasses.dataclass(frozen=True)
class Harvest:
    """The young pages, and the cost of the harvest and of re-arming."""

    young: YoungBitmap
    harvest_ns: int
    rearm_ns: int


class Harvester:
    """Owns the tracker of one VM and does its harvests, one at a time.

    :param note_young: receives the young pages that were cleared, before they are re-armed
    """

    def __init__(self, vm: TrackedVm, note_young: Callable[[YoungBitmap], None]) -> None:
        self._vm, self._note_young = vm, note_young
        self._sampler = Sampler()
        self._tracker: Tracker | None = None
        self._lock = threading.RLock()
        self._closed = False

    @property
    def tracker_name(self) -> str | None:
        """The tracker in use; None before the first."""
        return None if self._tracker is None else self._tracker.name

    def use(self, name: str = "auto") -> Tracker:
        """Return a started tracker; stop the previous one.

        The previous one is stopped last, so that it stays in use with its state if the new
        one cannot start.

        :param name: one of :data:`~kvmhost.trackers.registry.NAMES`, or ``auto``
        :raises CapabilityError: if it does not work here
        :raises LayoutError: for an unknown name
        """
        with self._lock:
            if self._closed:
                raise StateError("the machine")
            wanted = registry.resolve(name, self._vm)
            before = self._tracker
            if before is not None and before.name == wanted:
                return before
            tracker = registry.create(wanted, self._vm)
            try:
                tracker.start()
            except BaseException:
                tracker.stop()
                raise
            self._tracker = tracker
            if before is not None:
                before.stop()
            return tracker

    def harvest(
        self,
        gfn_start: int,
        n_pages: int,
        *,
        tracker: str = "auto",
        clear: bool = True,
        rearm: Rearm = "young",
        fraction: float | None = None,
        mask: Words | None = None,
    ) -> Harvest:
        """Do one harvest; concurrent harvests wait.

        :param tracker: ``auto`` keeps the one in use: a change begins a new window
        :param rearm: ``none``; ``young``, the pages that this cleared; ``all`` of the range;
            ``sample``, clear and re-arm a ``fraction`` only, other pages at each harvest
        :param fraction: with ``sample``, from 1/65536 to 1; None: a default that was measured
        :raises CapabilityError: if the tracker does not work here
        :raises LayoutError: if an argument is wrong; then the tracker in use and its state
            do not change
        """
        if rearm not in REARM:
            raise LayoutError(f"harvest: rearm {rearm!r}: need one of {', '.join(REARM)}")
        if fraction is not None:
            period_of(fraction)
        check_range(gfn_start, n_pages, self._vm.memory.gfn_end)
        check_mask(mask, n_pages)
        # All arguments are checked above: from here on trackers stop and bits are cleared.
        with self._lock:
            wanted = self.tracker_name if tracker == "auto" else tracker
            source = self.use(wanted or "auto")
            if rearm == "sample" and clear:
                sample = self._sampler.next_mask(gfn_start, n_pages, fraction or DEFAULT_FRACTION)
                mask = sample if mask is None else mask & sample
            start = time.perf_counter_ns()
            young = source.harvest(gfn_start, n_pages, clear, mask)
            middle = time.perf_counter_ns()
            if clear:
                self._note_young(young)
            if rearm == "all":
                source.rearm(gfn_start, n_pages)
            elif rearm != "none" and clear:
                cleared = young
                if mask is not None:
                    cleared = dataclasses.replace(young, words=young.words & mask)
                source.rearm(gfn_start, n_pages, cleared)
            return Harvest(young, middle - start, time.perf_counter_ns() - middle)

    def close(self) -> None:
        """Stop the tracker, and wait for a harvest in progress. Refuses later ones. Idempotent."""
        self._closed = True
        self.stop()
        with self._lock:
            self.stop()

    def stop(self) -> None:
        """Stop the tracker, from any thread and during a harvest too. Idempotent."""
        if self._tracker is not None:
            self._tracker.stop()
