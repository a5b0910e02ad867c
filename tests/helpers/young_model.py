"""Records of known content, and a model of them that shares no code with the record."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import strategies as st

from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.reclaim.record.writer import RecordWriter

SECOND = 10**9


@dataclasses.dataclass(frozen=True)
class Window:
    """What was appended, as plain Python."""

    n_pages: int
    gfns: frozenset[int]
    coarse: frozenset[int] | None
    start_ns: int
    end_ns: int
    tracker: str = "guestpt"

    def bitmap(self, gfn_start: int) -> YoungBitmap:
        coarse = None
        if self.coarse is not None:
            coarse = YoungBitmap.from_gfns(gfn_start, self.n_pages, sorted(self.coarse)).words
        source = Provenance(self.tracker, "npt", self.start_ns, self.end_ns)
        return YoungBitmap.from_gfns(
            gfn_start, self.n_pages, sorted(self.gfns), coarse=coarse, provenance=source
        )


@st.composite
def histories(draw, max_windows=150, max_pages=700):
    """Draw (gfn_start, windows): sizes grow and shrink, clocks jump, trackers change."""
    gfn_start = draw(st.sampled_from([0, 1, 0x400, (1 << 40) + 3]))
    n_windows = draw(st.integers(0, max_windows))
    n_pages = draw(st.integers(0, max_pages))
    seed = draw(st.integers(0, 2**32 - 1))
    density = draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    changes = draw(st.sets(st.integers(0, max(n_windows - 1, 0)), max_size=4))
    rng = np.random.default_rng(seed)
    windows, clock, tracker = [], 5 * SECOND, "guestpt"
    for number in range(n_windows):
        if number in changes:
            n_pages = int(rng.integers(0, max_pages + 1))
            clock = max(0, clock + int(rng.integers(-100, 100)) * SECOND)
            tracker = str(rng.choice(["guestpt", "pagemap"]))
        young = np.flatnonzero(rng.random(n_pages) < density) + gfn_start
        coarse = None
        if rng.random() < 0.1:
            coarse = frozenset(young[rng.random(young.size) < 0.5].tolist())
        windows.append(
            Window(n_pages, frozenset(young.tolist()), coarse, clock, clock + SECOND, tracker)
        )
        clock += SECOND
    return gfn_start, windows


def write(path, gfn_start, windows, n_pages=None, stops=()):
    """Write a record; after the windows in ``stops`` the writer is closed and begun anew."""
    first = windows[0].n_pages if windows else 10
    writer = RecordWriter.create(path, first if n_pages is None else n_pages, gfn_start=gfn_start)
    for number, window in enumerate(windows):
        writer.append(window.bitmap(gfn_start))
        if number in stops:
            writer.close()
            writer = RecordWriter.resume(path)
    return writer
