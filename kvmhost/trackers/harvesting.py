"""Harvests of one VM: find young pages, clear them, inform the pager, re-arm.

The order matters. The pager receives the young pages before they are re-armed, so that its
clock hand never treats a page that was just found young as old; and only pages whose bit
was cleared are re-armed, since re-arming costs the guest a fault.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import typing
from collections.abc import Callable

from kvmhost.bitmap import YoungBitmap
from kvmhost.errors import StateError
from kvmhost.trackers import registry
from kvmhost.trackers.base import TrackedVm, Tracker
from kvmhost.trackers.sampling import DEFAULT_FRACTION, Sampler
from kvmhost.vm.harvest import Harvest, HarvestRequest
from kvmhost.vm.names import TableFormat

if typing.TYPE_CHECKING:
    from kvmhost.mmu.feed import Feed

__all__ = ["Harvester"]


class Harvester:
    """Owns the tracker of one VM and does its harvests, one at a time.

    :param note_young: receives the young pages that were cleared, before they are re-armed
    """

    def __init__(self, vm: TrackedVm, note_young: Callable[[YoungBitmap], None]) -> None:
        self._vm, self._note_young = vm, note_young
        self._sampler = Sampler()
        self._tracker: Tracker | None = None
        self._feeds: dict[TableFormat, Feed] = {}
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

    def harvest(self, asked: HarvestRequest) -> Harvest:
        """Do one harvest; concurrent harvests wait.

        :raises CapabilityError: if the tracker does not work here
        :raises LayoutError: if the range, the mask or the tracker's name is wrong; then the
            tracker in use and its state do not change
        """
        asked = asked.within(self._vm.memory.gfn_end)
        gfn_start, n_pages, mask = asked.gfn_start, asked.count, asked.mask
        # All arguments are checked above: from here on trackers stop and bits are cleared.
        with self._lock:
            # First, so that a harvest that cannot be fed clears nothing.
            feed = None if asked.table_format is None else self._feed(asked.table_format)
            wanted = self.tracker_name if asked.tracker == "auto" else asked.tracker
            source = self.use(wanted or "auto")
            if asked.rearm == "sample" and asked.clear:
                fraction = asked.fraction or DEFAULT_FRACTION
                sample = self._sampler.next_mask(gfn_start, n_pages, fraction)
                mask = sample if mask is None else mask & sample
            start = time.perf_counter_ns()
            young = source.harvest(gfn_start, n_pages, asked.clear, mask)
            middle = time.perf_counter_ns()
            if asked.clear:
                self._note_young(young)
            if asked.rearm == "all":
                source.rearm(gfn_start, n_pages)
            elif asked.rearm != "none" and asked.clear:
                cleared = young
                if mask is not None:
                    cleared = dataclasses.replace(young, words=young.words & mask)
                source.rearm(gfn_start, n_pages, cleared)
            end = time.perf_counter_ns()
            found = young if feed is None else feed.harvest_via_model(young)
            return Harvest(found, middle - start, end - middle)

    def _feed(self, table_format: TableFormat) -> Feed:
        """Return the model table of a format, made on first use."""
        if self._closed:
            raise StateError("the machine")
        if table_format not in self._feeds:
            from kvmhost.mmu.feed import Feed

            self._feeds[table_format] = Feed(table_format, self._vm.memory.regions)
        return self._feeds[table_format]

    def close(self) -> None:
        """Stop the tracker, and wait for a harvest in progress. Refuses later ones. Idempotent."""
        self._closed = True
        self.stop()
        with self._lock:
            self.stop()
            for feed in self._feeds.values():
                feed.close()
            self._feeds.clear()

    def stop(self) -> None:
        """Stop the tracker, from any thread and during a harvest too. Idempotent."""
        if self._tracker is not None:
            self._tracker.stop()
