"""Views: for each reader of one VM, which pages became young since that reader last asked.

The accessed bit of a page is one bit, and clearing it hides the touch from everyone else. A
*sweep* is one physical test-and-clear by a tracker. Its young pages are added to every view;
the harvest of a reader takes and empties its own view only. So each reader gets what it
would get alone, whatever the others do. Linux does the same for two readers with the idle and
the young flag of a page.

A view takes one bit per page, and a second one once a tracker has reported coarse bits. Callers
serialize the calls, except :meth:`Views.list`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from kvmhost.bitmap import Words, YoungBitmap, clear_words, n_words, place_words, sub_words
from kvmhost.errors import InUseError
from kvmhost.trackers.sampling import Sampler
from kvmhost.vm.answers import ViewInfo
from kvmhost.vm.names import DEFAULT_VIEW

__all__ = ["MAX_VIEWS", "UNNAMED", "View", "ViewKey", "ViewStatus", "Views", "view_infos"]

#: Named views at one time: with coarse bits, all of them take 0.1 % of the memory of the VM.
MAX_VIEWS = 16
#: Parts of memory with window times of their own, in one view.
_MAX_PARTS = 64


class ViewKey(typing.NamedTuple):
    """Identifies a view.

    :param owner: the process that reads it, or a negative number for a connection whose process
        is not known; 0 for the unnamed one, which anyone may read
    :param name: unique for its owner; ``default`` for the unnamed one
    """

    owner: int
    name: str

    def __str__(self) -> str:
        if self.owner == 0:
            return self.name
        whose = f"process {self.owner}" if self.owner > 0 else "a process of another namespace"
        return f"{self.name} ({whose})"


#: The view of everyone who names none. It is open from the start and does not end.
UNNAMED = ViewKey(0, DEFAULT_VIEW)


@dataclasses.dataclass(frozen=True)
class ViewStatus:
    """A view, as others see it.

    :param window_start_ns: ``CLOCK_MONOTONIC``: when the oldest of its open windows began
    :param n_young: pages that were swept and not yet taken
    :param harvests: harvests through this view
    """

    key: ViewKey
    window_start_ns: int
    n_young: int
    harvests: int


class View:
    """The pages that became young since one reader last asked for them.

    :param n_pages: gfns are ``[0, n_pages)``
    :param now_ns: when its window begins
    """

    def __init__(self, key: ViewKey, n_pages: int, now_ns: int) -> None:
        self.key, self.n_pages = key, n_pages
        self.harvests = 0
        self.sampler = Sampler()
        #: When it was harvested last; 0: never.
        self.used_ns = 0
        self._young = np.zeros(n_words(n_pages), dtype=np.uint64)
        #: Pages of ``_young`` that no sweep distinguished; made at the first coarse bit.
        self._coarse: Words | None = None
        self._is_empty = True
        self._windows = _Windows(n_pages, now_ns)
        self._tracker_changed_ns = 0

    @property
    def n_young(self) -> int:
        """Pages that were swept and not yet taken."""
        whole = YoungBitmap(0, self.n_pages, self._young)
        return 0 if self._is_empty else whole.count()

    @property
    def n_bytes(self) -> int:
        """Memory that its bits take."""
        return self._young.nbytes + (0 if self._coarse is None else self._coarse.nbytes)

    @property
    def window_start_ns(self) -> int:
        """When the oldest of its windows began."""
        return self._windows.oldest_ns(0, self.n_pages)

    def started_ns(self, gfn_start: int, n_pages: int) -> int:
        """Return when the oldest window of a range began."""
        return self._windows.oldest_ns(gfn_start, gfn_start + n_pages)

    def add(self, found: YoungBitmap) -> None:
        """Add the young pages of a sweep."""
        if not found:
            return
        if found.coarse is not None or self._coarse is not None:
            self._add_coarse(found)
        place_words(self._young, found.gfn_start, found.words)
        self._is_empty = False

    def merged(self, found: YoungBitmap) -> YoungBitmap:
        """Return the young pages of a range: of this view, and of a sweep or a test."""
        first, count = found.gfn_start, found.n_pages
        words, coarse, source = found.words, found.coarse, found.provenance
        if not self._is_empty:
            waiting = sub_words(self._young, self.n_pages, first, count)
            words, coarse = waiting | words, self._merged_coarse(found, waiting)
        start_ns = self.started_ns(first, count)
        if start_ns < self._tracker_changed_ns:
            source = dataclasses.replace(source, tracker="mixed", evidence="")
        # A source without windows says so by 0.
        if source.window_start_ns:
            source = dataclasses.replace(source, window_start_ns=start_ns)
        return YoungBitmap(first, count, words, coarse, source)

    def take(self, gfn_start: int, n_pages: int, mask: Words | None, now_ns: int) -> None:
        """Empty a range, or the pages of a mask in it, and begin a new window for it."""
        whole = (gfn_start, n_pages) == (0, self.n_pages)
        self._windows.begin(gfn_start, gfn_start + n_pages, now_ns)
        if self._is_empty:
            return
        if mask is None and not whole:
            mask = sub_words(self._young, self.n_pages, gfn_start, n_pages)
        for words in (self._young, self._coarse):
            if words is not None and mask is not None:
                clear_words(words, gfn_start, mask)
            elif words is not None:
                words.fill(0)
        self._is_empty = not self._young.any()

    def move(self, n_pages: int, old: int, new: int, count: int) -> None:
        """Follow pages that lie at other gfns now; gfns are ``[0, n_pages)`` from here on."""
        oldest_ns = self.window_start_ns
        self._young = _moved(self._young, self.n_pages, n_pages, (old, new, count))
        if self._coarse is not None:
            self._coarse = _moved(self._coarse, self.n_pages, n_pages, (old, new, count))
        self.n_pages, self._windows = n_pages, _Windows(n_pages, oldest_ns)

    def reset(self, now_ns: int) -> None:
        """Discard all pages and begin a new window."""
        self.take(0, self.n_pages, None, now_ns)

    def note_tracker(self, now_ns: int) -> None:
        """Note that another tracker does the sweeps from now on: open windows are ``mixed``."""
        self._tracker_changed_ns = now_ns

    def status(self) -> ViewStatus:
        """Return what others may know. During a sweep the number is of before or after it."""
        return ViewStatus(self.key, self.window_start_ns, self.n_young, self.harvests)

    def _add_coarse(self, found: YoungBitmap) -> None:
        """Update which pages are coarse: those that no sweep of the window saw exactly."""
        if self._coarse is None:
            self._coarse = np.zeros_like(self._young)
        first, count, words = found.gfn_start, found.n_pages, found.words
        coarse = np.zeros_like(words) if found.coarse is None else words & found.coarse
        waiting = sub_words(self._young, self.n_pages, first, count)
        new = coarse & ~waiting
        clear_words(self._coarse, first, words & ~coarse)
        place_words(self._coarse, first, new)

    def _merged_coarse(self, found: YoungBitmap, waiting: Words) -> Words | None:
        if found.coarse is None and self._coarse is None:
            return None
        exact = waiting
        if self._coarse is not None:
            exact = exact & ~sub_words(self._coarse, self.n_pages, found.gfn_start, found.n_pages)
        seen = found.words if found.coarse is None else found.words & ~found.coarse
        coarse: Words = (waiting | found.words) & ~(exact | seen)
        return coarse if coarse.any() else None


class Views:
    """The views of one VM: an unnamed one from the start, and one for each named reader.

    :param n_pages: gfns are ``[0, n_pages)``
    """

    def __init__(self, n_pages: int, now_ns: int) -> None:
        self.n_pages = n_pages
        unnamed = View(UNNAMED, n_pages, now_ns)
        self._views = {unnamed.key: unnamed}

    def __iter__(self) -> Iterator[View]:
        return iter(self._views.values())

    def __len__(self) -> int:
        return len(self._views)

    def get(self, key: ViewKey) -> View | None:
        """Return a view; None if it is not open."""
        return self._views.get(key)

    def check_room(self, key: ViewKey) -> None:
        """Refuse a view that would be one too many.

        :raises InUseError: names the views that are open
        """
        if key not in self._views and len(self._views) > MAX_VIEWS:
            named = ", ".join(str(view.key) for view in self if view.key.owner)
            raise InUseError(
                f"view {key.name!r}",
                f"would be one more than the {MAX_VIEWS} of a VM, which are read by {named}",
                "end one of these",
            )

    def open(self, key: ViewKey, now_ns: int) -> View:
        """Make a view whose window begins now, right after a sweep of all memory.

        :raises InUseError: if there are too many
        """
        self.check_room(key)
        view = self._views[key] = View(key, self.n_pages, now_ns)
        return view

    def move(self, n_pages: int, old: int, new: int, count: int) -> None:
        """Follow pages that lie at other gfns now; gfns are ``[0, n_pages)`` from here on."""
        self.n_pages = n_pages
        for view in self:
            view.move(n_pages, old, new, count)

    def close(self, key: ViewKey) -> bool:
        """Remove a named view; return whether it was open."""
        return key.owner != 0 and self._views.pop(key, None) is not None

    def add(self, found: YoungBitmap, but: View | None = None) -> None:
        """Add the young pages of a sweep to all views but one."""
        for view in self:
            if view is not but:
                view.add(found)

    def list(self) -> list[ViewStatus]:
        """Return the state of every view, the unnamed one first. Any thread."""
        return [view.status() for view in tuple(self._views.values())]


def _moved(words: Words, before: int, n_pages: int, move: tuple[int, int, int]) -> Words:
    """Return a bitmap of ``before`` pages as one of ``n_pages``, with a run of bits moved."""
    old, new, count = move
    part = sub_words(words, before, old, count).copy()
    clear_words(words, old, part)
    found = np.zeros(n_words(n_pages), dtype=np.uint64)
    kept = min(found.size, words.size)
    found[:kept] = words[:kept]
    place_words(found, new, part)
    return found


class _Windows:
    """When the window of each page began: runs ``(start, end, ns)`` in order over all pages."""

    def __init__(self, n_pages: int, now_ns: int) -> None:
        self._runs = [(0, n_pages, now_ns)]

    def begin(self, start: int, end: int, now_ns: int) -> None:
        """Begin the window of ``[start, end)``."""
        if start >= end:
            return
        if len(self._runs) >= _MAX_PARTS:
            # A window that begins too early still contains every touch that is reported.
            self._runs = [(0, self._runs[-1][1], min(run[2] for run in self._runs))]
        runs = [(start, end, now_ns)]
        for low, high, began_ns in self._runs:
            parts = ((low, min(high, start)), (max(low, end), high))
            runs += [(a, b, began_ns) for a, b in parts if a < b]
        self._runs = sorted(runs)

    def oldest_ns(self, start: int, end: int) -> int:
        """Return when the oldest window of ``[start, end)`` began."""
        return min(
            (ns for low, high, ns in self._runs if low < end and start < high),
            default=self._runs[0][2],
        )


def view_infos(views: Iterable[ViewStatus], now_ns: int) -> list[ViewInfo]:
    """Return the views as the state of a VM lists them."""
    return [
        ViewInfo(
            name=view.key.name,
            pid=max(view.key.owner, 0),
            process=_process_name(view.key.owner),
            window_s=max(0, now_ns - view.window_start_ns) / 1e9,
            n_young=view.n_young,
            harvests=view.harvests,
        )
        for view in views
    ]


def _process_name(pid: int) -> str:
    """Return the name of a process; empty if it has none."""
    with contextlib.suppress(OSError):
        if pid > 0:
            return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    return ""
