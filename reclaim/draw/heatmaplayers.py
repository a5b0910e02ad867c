"""What a page shows of residency and events: a pyramid per array, and a curve per window."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from kvmhost.reclaim.draw.heatmapdata import BIT_LEVELS, RecordView
from kvmhost.reclaim.draw.heatmaptiles import Pyramid, build_layer
from kvmhost.reclaim.record.meta import EVICTIONS, STATES

__all__ = ["PageLayers", "layers_of"]

#: Events that a page shows: evictions by whose decision they were, and refaults.
SHOWN_EVENTS = (*EVICTIONS, "refaulted")


@dataclasses.dataclass(frozen=True)
class PageLayers:
    """Layers of a page.

    :param pyramids: by array: of states and of events that occurred
    :param curves: by array: one number per window of the view. Young, resident and evicted count
        pages of the view; events count those of the whole VM
    :param left_out: arrays with more bits than can be counted
    """

    pyramids: dict[str, Pyramid]
    curves: dict[str, npt.NDArray[np.int64]]
    left_out: list[str]

    @property
    def n_bytes(self) -> int:
        """Size of all tiles."""
        return sum(pyramid.n_bytes for pyramid in self.pyramids.values())


def layers_of(view: RecordView, budget_bytes: int) -> PageLayers:
    """Build the layers of a view, each within its share of a budget.

    Without residency in the view, there is only the curve of young pages.
    """
    curves = {"young": _young_pages(view)}
    if not view.record.has_residency()[view.first : view.end].any():
        return PageLayers({}, curves, [])
    windows = slice(view.first, view.end)
    events = {name: view.record.column(f"n_{name}")[windows] for name in SHOWN_EVENTS}
    events = {name: counts for name, counts in events.items() if counts.any()}
    names = [*STATES, *events]
    pyramids: dict[str, Pyramid] = {}
    left_bytes = budget_bytes
    for at, name in enumerate(names):
        found = build_layer(view, name, left_bytes // (len(names) - at))
        if found is not None:
            pyramids[name] = found
            left_bytes = max(left_bytes - found.n_bytes, 0)
    for name in STATES:
        if name in pyramids:
            curves[name] = _pages_of(view, name)
    return PageLayers(pyramids, curves | events, [name for name in names if name not in pyramids])


def _young_pages(view: RecordView) -> npt.NDArray[np.int64]:
    level = max(BIT_LEVELS[0], (view.n_pages - 1).bit_length() - 10)
    return np.concatenate(
        [
            view.counts(level, first, end).sum(axis=1, dtype=np.int64)
            for first, end in view.bands(view.n_bins(BIT_LEVELS[0]))
        ]
    )


def _pages_of(view: RecordView, name: str) -> npt.NDArray[np.int64]:
    """Return the pages of the view in a state at the end of each window."""
    if view.n_pages == view.record.n_pages:
        return view.record.column(f"n_{name}")[view.first : view.end]
    base = BIT_LEVELS[0]
    return np.concatenate(
        [
            view.bit_counts((base,), first, end, name=name)[base].sum(axis=1, dtype=np.int64)
            for first, end in view.bands(view.n_bins(base))
        ]
    )
