"""The tracker of one VM, and the harvests that its readers do with it.

One tracker works at a time, and every reader gets its bits
(:mod:`kvmhost.trackers.sharing`). So a reader may change it only while it is alone, or by
force. A forced change by a named reader is undone when its view ends; until then the others
are served by the new tracker, and what the old one had found stays in their views.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
import typing
from collections.abc import Callable, Sequence

from kvmhost.bitmap import Words, YoungBitmap, clear_words, sub_words
from kvmhost.errors import InUseError, KvmHostError, StateError
from kvmhost.memory.guest import Region, pieces
from kvmhost.trackers import registry
from kvmhost.trackers.base import TrackedVm, Tracker
from kvmhost.trackers.forced import ForcedChanges
from kvmhost.trackers.sharing import SharedHarvests, Source
from kvmhost.trackers.views import UNNAMED, ViewKey, ViewStatus
from kvmhost.vm.answers import HarvestTotals, RearmCost
from kvmhost.vm.harvest import Harvest, HarvestRequest
from kvmhost.vm.names import DEFAULT_VIEW, TableFormat

if typing.TYPE_CHECKING:
    from kvmhost.mmu.feed import Feed

__all__ = ["Harvester"]

log = logging.getLogger("kvmhost.trackers")

#: Whoever harvested the unnamed view in this time counts as a reader.
_UNNAMED_NS = 60 * 10**9


class Harvester:
    """Owns the tracker of one VM and does its harvests, one at a time.

    :param note_young: receives the young pages of each sweep, before they are re-armed
    """

    def __init__(self, vm: TrackedVm, note_young: Callable[[YoungBitmap], None]) -> None:
        self._vm = vm
        self._shared = SharedHarvests(vm.memory.gfn_end, note_young)
        self._tracker: Tracker | None = None
        self._forced = ForcedChanges()
        self._feeds: dict[TableFormat, Feed] = {}
        self._lock = threading.RLock()
        self._closed = False
        #: Number and total cost of the harvests.
        self.totals = HarvestTotals(0, 0, 0, 0, 0)

    @property
    def tracker_name(self) -> str | None:
        """The tracker in use; None before the first."""
        return None if self._tracker is None else self._tracker.name

    @property
    def sweeps(self) -> int:
        """Physical harvests that cleared."""
        return self._shared.sweeps

    @property
    def n_cleared(self) -> int:
        """Pages that sweeps cleared: each costs the guest a fault if it is touched again."""
        return self._shared.n_cleared

    @property
    def n_retouched(self) -> int:
        """Cleared pages that were found young again: each cost the guest a fault."""
        return self._shared.n_retouched

    def use(self, name: str = "auto", *, force: bool = False) -> Tracker:
        """Return a started tracker; stop the previous one.

        The previous one is stopped last, so that it stays in use with its state if the new
        one cannot start. Harvests of the tracker itself bypass the views: a page that they
        clear is in no view.

        :param name: one of :data:`~kvmhost.trackers.registry.NAMES`, or ``auto``
        :param force: also while named views are open
        :raises CapabilityError: if it does not work here
        :raises LayoutError: for an unknown name
        :raises InUseError: if named views are open
        :raises StateError: if the machine is closed
        """
        with self._lock:
            return self._use(registry.resolve(name, self._vm), UNNAMED, force)

    def harvest(self, asked: HarvestRequest, owner: int | None = None) -> Harvest:
        """Do one harvest; concurrent harvests wait.

        :param owner: process of the reader; None: this one
        :raises CapabilityError: if the tracker does not work here
        :raises LayoutError: if the range, the mask or the tracker's name is wrong; then the
            tracker in use and its state do not change
        :raises InUseError: if others read by another tracker, or there are too many views
        """
        asked = asked.within(self._vm.memory.gfn_end)
        key = _key(asked.view, owner)
        # All arguments are checked above: from here on trackers stop and bits are cleared.
        with self._lock:
            # First, so that a harvest that cannot be fed clears nothing.
            feed = None if asked.table_format is None else self._feed(asked.table_format)
            self._shared.views.check_room(key)
            source = self._source(asked, key)
            found = self._shared.harvest(self._attached(source), key, asked)
            if feed is not None:
                found = dataclasses.replace(found, young=feed.harvest_via_model(found.young))
            self._count(found)
            return found

    def rearm_cost(self) -> RearmCost:
        """Return what the touch of a re-armed page costs the guest, with the tracker in use.

        It is measured with a small VM of its own, and again when the figure is a minute old.

        :raises StateError: before the first harvest, when no tracker is in use
        :raises CapabilityError: if a VM of its own cannot be made
        """
        name = self.tracker_name
        if name is None:
            raise StateError("the tracker", "is not in use yet", "harvest first")
        from kvmhost.trackers.rearmcost import rearm_cost

        return rearm_cost(name, self._vm.engine.name)

    def _count(self, found: Harvest) -> None:
        old = self.totals
        self.totals = HarvestTotals(
            old.harvests + 1,
            old.n_pages + found.young.n_pages,
            old.n_young + found.n_young,
            old.harvest_ns + found.harvest_ns,
            old.rearm_ns + found.rearm_ns,
            self._shared.sweeps,
            self._shared.n_cleared,
            self._shared.n_retouched,
        )

    def change_region(self, region: Region, change: Callable[[], None]) -> None:
        """Move, delete or restore a region's memslot while no harvest runs.

        What was young goes into the views first, and they follow a move; pages of a deleted
        slot are in no view. The tracker begins anew.

        :param change: makes the change
        :raises CapabilityError: if the tracker does not start again; the change is made then
        """
        with self._lock:
            before, old = self._tracker, region.gfn
            if before is not None:
                self._shared.sweep_all(self._attached(before))
            change()
            region.zap(region.gfn, region.n_pages)
            for feed in self._feeds.values():
                feed.close()
            self._feeds.clear()
            self._shared.move(self._vm.memory.gfn_end, old, region.gfn, region.n_pages)
            if not region.attached:
                self._shared.forget(region.gfn, region.n_pages)
            if before is not None and not self._closed:
                before.stop()
                self._tracker = None
                self._tracker = registry.create(before.name, self._vm)
                self._tracker.start()

    def _attached(self, tracker: Tracker) -> Source:
        """Return a tracker as the source of a sweep: no page of a deleted slot is young."""
        hidden = [region for region in self._vm.memory.regions if not region.attached]
        return _Attached(tracker, hidden) if hidden else tracker

    def views(self) -> list[ViewStatus]:
        """Return the state of the views. Any thread; does not wait for harvests."""
        return self._shared.views.list()

    def close_view(self, name: str, owner: int | None = None) -> bool:
        """End a view and undo its forced change of the tracker; return whether it was open.

        :param owner: process of the reader; None: this one
        """
        key = _key(name, owner)
        with self._lock:
            is_open = self._shared.views.close(key)
            if is_open and not self._closed:
                self._undo(key)
            return is_open

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

    # -- the tracker ----------------------------------------------------------

    def _source(self, asked: HarvestRequest, key: ViewKey) -> Tracker:
        """Return the tracker for a harvest: the one in use, unless another may replace it."""
        current = self._tracker
        if current is not None and asked.tracker == "auto":
            return self._use(current.name, key, force=False)
        wanted = registry.resolve(asked.tracker, self._vm)
        if current is not None and self._forced.is_forced_on(key, wanted):
            return self._use(current.name, key, force=False)
        return self._use(wanted, key, asked.force)

    def _use(self, wanted: str, key: ViewKey, force: bool) -> Tracker:
        if self._closed:
            raise StateError("the machine")
        before = self._tracker
        if before is not None and before.name == wanted:
            return before
        others = self._others(key)
        if before is not None and others and not (force or self._forced.takes_back(key, wanted)):
            raise InUseError(
                f"tracker {before.name}",
                f"is in use by {', '.join(others)}",
                f"read by it too, or force the change to {wanted}",
            )
        tracker = self._start(wanted)
        if key == UNNAMED:
            self._forced.clear()
        elif before is not None and others:
            self._forced.note(key, before.name, wanted)
        self._shared.note_tracker(key)
        return tracker

    def _start(self, wanted: str) -> Tracker:
        """Replace the tracker; what it had found moves into the views."""
        before, tracker = self._tracker, registry.create(wanted, self._vm)
        try:
            if before is not None and len(self._shared.views) > 1:
                self._shared.sweep_all(self._attached(before))
            tracker.start()
        except BaseException:
            tracker.stop()
            raise
        self._tracker = tracker
        if before is not None:
            before.stop()
        return tracker

    def _others(self, key: ViewKey) -> list[str]:
        """Return the names of the other readers."""
        since_ns = time.monotonic_ns() - _UNNAMED_NS
        views = self._shared.readers(key, since_ns)
        return [str(view.key) if view.key.owner else "the unnamed view" for view in views]

    def _undo(self, key: ViewKey) -> None:
        """Undo a reader's forced change."""
        before = self._forced.undo(key)
        if before is None:
            return
        try:
            self._start(before)
        except KvmHostError as error:
            log.warning("tracker %s is not back in use: %s", before, error)
            return
        self._shared.note_tracker(key)

    def _feed(self, table_format: TableFormat) -> Feed:
        """Return the model table of a format, made on first use."""
        if self._closed:
            raise StateError("the machine")
        if table_format not in self._feeds:
            from kvmhost.mmu.feed import Feed

            self._feeds[table_format] = Feed(table_format, self._vm.memory.regions)
        return self._feeds[table_format]


class _Attached:
    """A tracker without the pages of regions whose memslots are deleted."""

    def __init__(self, tracker: Tracker, hidden: Sequence[Region]) -> None:
        self._tracker, self._hidden = tracker, hidden
        self.rearm = tracker.rearm

    def harvest(
        self, gfn_start: int, n_pages: int, clear: bool = True, mask: Words | None = None
    ) -> YoungBitmap:
        """Harvest, and drop the bits of hidden pages."""
        found = self._tracker.harvest(gfn_start, n_pages, clear, mask)
        for _, start, count in pieces(self._hidden, gfn_start, n_pages):
            for words in (found.words, found.coarse):
                if words is not None:
                    part = sub_words(words, n_pages, start - gfn_start, count).copy()
                    clear_words(words, start - gfn_start, part)
        return found


def _key(name: str, owner: int | None) -> ViewKey:
    if name == DEFAULT_VIEW:
        return UNNAMED
    return ViewKey(os.getpid() if owner is None else owner, name)
