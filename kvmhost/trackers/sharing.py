"""Harvests of one source of young bits for any number of readers, exact for each of them.

A harvest with ``clear`` sweeps: it tests and clears the range with the tracker, adds the young
pages to the views of all readers, re-arms them, and empties the reader's own view. What a mask
or a sample leaves out is neither cleared by the sweep nor taken from the view. A harvest
without ``clear`` returns the view and what the tracker would report, and changes nothing.

A page that is young for the tracker was touched since every reader cleared it last, because
each of them cleared it there. So a sweep may add every page that it finds, also those that it
does not clear: a huge leaf is cleared as a whole, whatever part of it was asked for.

The order matters. The views and the pager receive the young pages before they are re-armed:
an error after the sweep loses no page, and the pager's clock hand never treats a page that was
just found young as old. Only pages whose bit was cleared are re-armed, since re-arming costs
the guest a fault.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from kvmhost.bitmap import (
    Provenance,
    Words,
    YoungBitmap,
    clear_words,
    n_words,
    place_words,
    sub_words,
)
from kvmhost.trackers.sampling import DEFAULT_FRACTION
from kvmhost.trackers.views import View, ViewKey, Views
from kvmhost.vm.harvest import Harvest, HarvestRequest

__all__ = ["SharedHarvests", "Source"]

#: Pages of the largest leaf that is cleared as a whole.
_LEAF_PAGES = 512


class Source(Protocol):
    """A tracker, or another source that is swept in the same way."""

    def harvest(
        self, gfn_start: int, n_pages: int, clear: bool = True, mask: Words | None = None
    ) -> YoungBitmap:
        """Return the young pages of a range; with ``clear``, clear those of the mask."""

    def rearm(self, gfn_start: int, n_pages: int, young: YoungBitmap | None = None) -> None:
        """Make the next touch of cleared pages visible again; None: of all pages."""


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """A sweep that cleared every page of a range."""

    gfn_start: int
    gfn_end: int
    source: Provenance


class SharedHarvests:
    """The views of one VM, and the sweeps that fill them. One call at a time.

    :param n_pages: gfns are ``[0, n_pages)``
    :param note_young: receives the young pages of every sweep, before they are re-armed
    """

    def __init__(self, n_pages: int, note_young: Callable[[YoungBitmap], None]) -> None:
        self.views = Views(n_pages, time.monotonic_ns())
        self._note_young = note_young
        #: The last sweep, if it cleared every page of its range.
        self._last: _Sweep | None = None
        #: Sweeps so far, the pages that they cleared, and those of them that were touched again
        #: later: each of these cost the guest a fault.
        self.sweeps = self.n_cleared = self.n_retouched = 0
        #: Pages that were cleared and not yet found young again.
        self._armed = np.zeros(n_words(n_pages), dtype=np.uint64)

    def harvest(self, source: Source, key: ViewKey, asked: HarvestRequest) -> Harvest:
        """Do one harvest for the reader of a view; its first one opens the view.

        A new view is empty, whatever the range: its window begins with a sweep of all memory.

        :param asked: as :meth:`HarvestRequest.within` returned it
        :raises InUseError: if there are too many views
        """
        view = self.views.get(key)
        if view is None:
            return self._open(source, key, asked)
        view.harvests += 1
        view.used_ns = time.monotonic_ns()
        mask = _cleared_part(view, asked)
        recent = self._recent(view, asked)
        if recent is not None:
            return _take_waiting(view, asked, mask, recent.source)
        return self._harvest(source, view, asked, mask)

    def sweep_all(self, source: Source) -> Harvest:
        """Move every young page from the tracker into the views."""
        n_pages = self.views.n_pages
        start = time.perf_counter_ns()
        found = source.harvest(0, n_pages, True, None)
        middle = time.perf_counter_ns()
        self._note_sweep(found, None, own=None)
        source.rearm(0, n_pages, found)
        return Harvest(found, middle - start, time.perf_counter_ns() - middle)

    def move(self, n_pages: int, old: int, new: int, count: int) -> None:
        """Follow pages that lie at other gfns now; gfns are ``[0, n_pages)`` from here on."""
        self._last = None
        self.views.move(n_pages, old, new, count)
        self._armed = np.zeros(n_words(n_pages), dtype=np.uint64)

    def forget(self, gfn_start: int, n_pages: int) -> None:
        """Take a range out of all views: no memslot shows it any more."""
        for view in self.views:
            view.take(gfn_start, n_pages, None, time.monotonic_ns())

    def readers(self, key: ViewKey, since_ns: int) -> list[View]:
        """Return the views of others that are in use.

        :param since_ns: the unnamed view is in use if it was harvested after this time
        """
        return [
            view
            for view in self.views
            if view.key != key and (view.key.owner or view.used_ns > since_ns)
        ]

    def note_tracker(self, key: ViewKey) -> None:
        """Note that another tracker began: a new window for the reader who asked for it.

        The others keep what the tracker before found.
        """
        now_ns, self._last = time.monotonic_ns(), None
        self._armed.fill(0)
        for view in self.views:
            view.note_tracker(now_ns)
            if view.key == key:
                view.reset(now_ns)

    def _open(self, source: Source, key: ViewKey, asked: HarvestRequest) -> Harvest:
        self.views.check_room(key)
        swept = self.sweep_all(source)
        origin = swept.young.provenance
        self.views.open(key, origin.window_end_ns)
        nothing = YoungBitmap(
            asked.gfn_start,
            asked.count,
            np.zeros(n_words(asked.count), dtype=np.uint64),
            None,
            dataclasses.replace(origin, window_start_ns=origin.window_end_ns),
        )
        return dataclasses.replace(swept, young=nothing)

    def _recent(self, view: View, asked: HarvestRequest) -> _Sweep | None:
        """Return a sweep that the harvest may end its window with, instead of a new one.

        The view must hold exactly what was touched until then: the last sweep must have cleared
        every page of the range, after the view's window began.
        """
        last, first = self._last, asked.gfn_start
        if last is None or not asked.clear or asked.rearm == "all":
            return None
        if not (last.gfn_start <= first and first + asked.count <= last.gfn_end):
            return None
        end_ns = last.source.window_end_ns
        is_fresh = time.monotonic_ns() - end_ns < asked.max_age_s * 1e9
        return last if is_fresh and view.started_ns(first, asked.count) < end_ns else None

    def _harvest(
        self, source: Source, view: View, asked: HarvestRequest, mask: Words | None
    ) -> Harvest:
        first, count = asked.gfn_start, asked.count
        if not asked.clear:
            start = time.perf_counter_ns()
            young = view.merged(source.harvest(first, count, False, None))
            middle = time.perf_counter_ns()
            if asked.rearm == "all":
                source.rearm(first, count)
            return Harvest(young, middle - start, time.perf_counter_ns() - middle)
        swept = self._sweep(source, view, asked, mask)
        young = view.merged(swept.young)
        view.take(first, count, mask, young.provenance.window_end_ns)
        return dataclasses.replace(swept, young=young)

    def _sweep(
        self, source: Source, view: View, asked: HarvestRequest, mask: Words | None
    ) -> Harvest:
        """Sweep a range for all readers; return what it found in it, and the cost."""
        first, count = asked.gfn_start, asked.count
        low, high = _whole_leaves(first, first + count, self.views.n_pages)
        wanted = _widened(mask, first - low, count, high - low)
        start = time.perf_counter_ns()
        found = source.harvest(low, high - low, True, wanted)
        middle = time.perf_counter_ns()
        own = None if found.n_pages != count or mask is not None else view
        self._note_sweep(found, wanted, own)
        part = found if found.n_pages == count else found[first - low : first - low + count]
        if asked.rearm == "all":
            source.rearm(first, count)
        elif asked.rearm != "none" or self.readers(view.key, 0):
            # A reader that does not re-arm would hide the next touch from the others.
            source.rearm(first, count, _part(part, mask))
        return Harvest(part, middle - start, time.perf_counter_ns() - middle)

    def _note_sweep(self, found: YoungBitmap, mask: Words | None, own: View | None) -> None:
        """Pass a sweep to the pager and to the views.

        :param own: the view that takes all of it at once and so need not store it
        """
        self._note_young(found)
        self.views.add(found, but=own)
        self._count(found, _part(found, mask))
        end = found.gfn_start + found.n_pages
        self._last = _Sweep(found.gfn_start, end, found.provenance) if mask is None else None

    def _count(self, found: YoungBitmap, cleared: YoungBitmap) -> None:
        """Count a sweep, and the pages whose touch was a fault because an earlier one cleared them.

        A page that is found young and not cleared is counted once, however often it is found.
        """
        first, count, whole = found.gfn_start, found.n_pages, self.views.n_pages
        again = found.words & sub_words(self._armed, whole, first, count)
        self.n_retouched += dataclasses.replace(found, words=again, coarse=None).count()
        clear_words(self._armed, first, found.words)
        place_words(self._armed, first, cleared.words)
        self.sweeps += 1
        self.n_cleared += cleared.count()


def _part(found: YoungBitmap, mask: Words | None) -> YoungBitmap:
    return found if mask is None else dataclasses.replace(found, words=found.words & mask)


def _whole_leaves(start: int, end: int, gfn_end: int) -> tuple[int, int]:
    """Extend a range to whole leaves of 2 MiB."""
    if start == end:
        return start, end
    return start // _LEAF_PAGES * _LEAF_PAGES, min(-(-end // _LEAF_PAGES) * _LEAF_PAGES, gfn_end)


def _widened(mask: Words | None, first: int, count: int, n_pages: int) -> Words | None:
    """Return the mask of a range as one of a longer range, of which it is a part."""
    if n_pages == count:
        return mask
    wide = np.zeros(n_words(n_pages), dtype=np.uint64)
    place_words(wide, first, _all_pages(count) if mask is None else mask)
    return wide


def _all_pages(n_pages: int) -> Words:
    words = np.full(n_words(n_pages), ~np.uint64(0), dtype=np.uint64)
    return sub_words(words, words.size * 64, 0, n_pages)


def _cleared_part(view: View, asked: HarvestRequest) -> Words | None:
    """Return the pages of the range that the harvest clears; None: all."""
    if asked.rearm != "sample" or not asked.clear:
        return asked.mask
    fraction = asked.fraction or DEFAULT_FRACTION
    sample = view.sampler.next_mask(asked.gfn_start, asked.count, fraction)
    return sample if asked.mask is None else asked.mask & sample


def _take_waiting(
    view: View, asked: HarvestRequest, mask: Words | None, source: Provenance
) -> Harvest:
    """Take what the view holds, up to a sweep that was done for another reader."""
    start = time.perf_counter_ns()
    nothing = np.zeros(n_words(asked.count), dtype=np.uint64)
    found = YoungBitmap(asked.gfn_start, asked.count, nothing, None, source)
    young = view.merged(found)
    view.take(asked.gfn_start, asked.count, mask, source.window_end_ns)
    return Harvest(young, time.perf_counter_ns() - start, 0)
