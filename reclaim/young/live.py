"""Young bitmaps of a running VM or process, one per window."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Protocol

from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.errors import VmGoneError
from kvmhost.vm.names import SHARED_SWEEP
from kvmhost.vm.protocol import YoungSource

__all__ = ["LiveWindow", "NamedSource", "live_windows"]


class NamedSource(YoungSource, Protocol):
    """A VM's :class:`~kvmhost.control.client.Client`, or another process."""

    vm: str


@dataclasses.dataclass(frozen=True)
class LiveWindow:
    """The young pages of one window, with its times on ``CLOCK_MONOTONIC``."""

    bitmap: YoungBitmap
    start_ns: int
    end_ns: int


def live_windows(
    source: NamedSource,
    *,
    interval_s: float,
    count: int,
    tracker: str = "auto",
    gfns: tuple[int, int | None] = (0, None),
    view: str = "heatmap",
    force: bool = False,
) -> Iterator[LiveWindow]:
    """Harvest window by window, until the count or the end of the VM.

    They are windows of a view of its own; each may end with the sweep of another reader.

    :param gfns: first gfn and number of pages; None for all pages up to the end of memory
    :raises VmGoneError: if the VM does not exist
    :raises ControlError: if the VM refuses to be harvested
    """
    gfn_start, n_pages = gfns
    opened = source.harvest(gfn_start, n_pages, tracker=tracker, view=view, force=force).young
    tracker, n_pages = opened.provenance.tracker, opened.n_pages
    begin_ns = end_ns = time.monotonic_ns()
    for number in range(1, count + 1):
        # Measured from the start, so that one late window does not delay all others.
        time.sleep(max(0.0, begin_ns / 1e9 + number * interval_s - time.monotonic()))
        try:
            bitmap = source.harvest(
                gfn_start,
                n_pages,
                tracker=tracker,
                view=view,
                max_age_s=SHARED_SWEEP * interval_s,
            ).young
        except VmGoneError:
            return
        start_ns, end_ns = _times(bitmap.provenance, end_ns)
        yield LiveWindow(bitmap, start_ns, end_ns)


def _times(source: Provenance, before_ns: int) -> tuple[int, int]:
    """Return start and end of a window; without a start of its own, it follows the one before."""
    if source.window_start_ns:
        return source.window_start_ns, source.window_end_ns
    return before_ns, time.monotonic_ns()
