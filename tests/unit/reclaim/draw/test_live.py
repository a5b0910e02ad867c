"""Pictures of what runs: the recording behind them, and the parts that they show."""

from __future__ import annotations

import dataclasses
import time
import types
from pathlib import Path

import numpy as np
import pytest
from young_model import SECOND

from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.control.schema import MemoryMap, MemslotInfo
from kvmhost.errors import VmGoneError
from kvmhost.reclaim.draw import live
from kvmhost.reclaim.draw.heatmapdata import RecordView, heatmap_of, used_view
from kvmhost.reclaim.draw.heatmaptiles import build_pyramid
from kvmhost.reclaim.draw.parts import PageParts, joined_runs
from kvmhost.reclaim.draw.render import render_heatmap
from kvmhost.reclaim.record.meta import EVENTS, STATES
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.recorder import RecordingPlan
from kvmhost.reclaim.record.residency import WindowResidency
from kvmhost.reclaim.record.writer import RecordWriter
from kvmhost.vm import Harvest

pytest.importorskip("zstandard")

N_PAGES = 1 << 16
SOURCE = Provenance("written", "host-process")


class FakeProcess:
    """A source without a pager, such as another process."""

    vm = "pid 7"

    def __init__(self, windows: int, interrupt: bool = False) -> None:
        self.windows, self.interrupt, self.end_ns = windows, interrupt, time.monotonic_ns()

    def state(self):
        return types.SimpleNamespace(image="/x/toucher", tracker="written")

    def memory_map(self):
        slot = MemslotInfo(0, 0, N_PAGES << 12, 0, N_PAGES, 0)
        return MemoryMap(4096, N_PAGES, [slot], [])

    def harvest(self, gfn_start, n_pages, **asked):
        assert asked["view"] == "mine"
        if not self.windows:
            raise KeyboardInterrupt if self.interrupt else VmGoneError("pid 7", "hung up")
        self.windows -= 1
        start_ns, self.end_ns = self.end_ns, time.monotonic_ns()
        source = dataclasses.replace(SOURCE, window_start_ns=start_ns, window_end_ns=self.end_ns)
        gfns = [gfn for gfn in (0x400, 0x401, 0xF000) if gfn_start <= gfn < gfn_start + n_pages]
        return Harvest(YoungBitmap.from_gfns(gfn_start, n_pages, gfns, provenance=source), 1, 1)


def plan(count: int, **given) -> RecordingPlan:
    return RecordingPlan(0.001, count, "auto", view="mine", **given)


@pytest.fixture
def drawn(monkeypatch):
    """The views that are drawn: caption, ranges of gfns and windows."""
    found = []

    def note(view: RecordView, path: Path, **options: object) -> str:
        heatmap = heatmap_of(view)
        found.append((heatmap.caption, heatmap.ranges, view.n_windows, options))
        return "drawn"

    monkeypatch.setattr(live, "draw_record", note)
    return found


def test_what_runs_is_recorded_and_drawn(drawn, tmp_path):
    advanced = []
    text = live.draw_vm(
        FakeProcess(9), tmp_path / "x.png", plan(3), on_window=lambda: advanced.append(1), n_bins=7
    )
    (caption, ranges, n_windows, options) = drawn[0]
    assert (text, n_windows, len(advanced), options) == ("drawn", 3, 3, {"n_bins": 7})
    assert "reads are not seen; residency unknown" in caption
    assert ranges == [(0x400, 0x600), (0xF000, 0xF200)]
    assert "left out: 252.0 MiB without a young page (--all shows them)" in caption


def test_all_of_memory_or_a_range_is_shown_on_request(drawn, tmp_path):
    live.draw_vm(FakeProcess(9), tmp_path / "x.png", plan(1), show_all=True)
    live.draw_vm(FakeProcess(9), tmp_path / "x.png", plan(1, gfns=(0x400, 0x800)))
    assert [ranges for _, ranges, _, _ in drawn] == [[(0, N_PAGES)], [(0x400, 0x800)]]
    assert not any("left out" in caption for caption, _, _, _ in drawn)


def test_the_end_of_the_vm_or_an_interrupt_keeps_what_there_was(drawn, tmp_path):
    live.draw_vm(FakeProcess(3), tmp_path / "x.png", plan(9))
    live.draw_vm(FakeProcess(4, interrupt=True), tmp_path / "x.png", plan(9))
    assert [n_windows for _, _, n_windows, _ in drawn] == [2, 3]
    with pytest.raises(VmGoneError, match="before the end of the first window"):
        live.draw_vm(FakeProcess(1), tmp_path / "x.png", plan(9))
    for windows in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            live.draw_vm(FakeProcess(windows, interrupt=True), tmp_path / "x.png", plan(9))


# -- which parts are used ----------------------------------------------------------


def test_runs_of_used_bins():
    used = np.zeros(640, dtype=bool)
    assert joined_runs(used) is None
    used[[3, 4, 5, 12]] = True
    assert joined_runs(used) == [(3, 13)]  # nearer than 1/64 of all
    used[[300, 639]] = True
    assert joined_runs(used) == [(3, 13), (300, 301), (639, 640)]
    used[100:420] = True
    assert joined_runs(used) is None
    scattered = np.zeros(640, dtype=bool)
    scattered[::64] = True
    runs = joined_runs(scattered)
    assert runs is None or len(runs) <= 6


def test_positions_and_pages():
    parts = PageParts(((512, 1024), (4096, 4608), (9000, 9100)))
    pages = [*range(512, 1024), *range(4096, 4608), *range(9000, 9100)]
    assert parts.n_pages == len(pages)
    assert [parts.page_at(i) for i in range(len(pages))] == pages
    assert [parts.position_of(page) for page in pages] == list(range(len(pages)))
    assert [parts.position_of(p) for p in (0, 2000, 8999, 10_000)] == [0, 512, 1024, 1124]
    assert parts.cuts() == [(512, 3072), (1024, 4392)]
    found = [page for low, high, _ in parts.between(500, 1030) for page in range(low, high)]
    assert found == pages[500:1030]
    assert [at for _, _, at in parts.between(500, 1030)] == [500, 512, 1024]


@pytest.fixture
def idle(tmp_path):
    """A record of 256 MiB, of which 4 MiB are used, in which one page was evicted."""
    with RecordWriter.create(tmp_path / "r", N_PAGES, gfn_start=0x100) as writer:
        for w in range(70):
            times = Provenance("guestpt", "npt", (w + 1) * SECOND, (w + 2) * SECOND)
            words = {name: np.zeros(N_PAGES // 64, dtype=np.uint64) for name in (*STATES, *EVENTS)}
            words["evicted"][30_000 // 64] = 1 << (30_000 % 64)
            gfns = [0x100 + 700 + w, 0x100 + 50_000 + 3 * w]
            young = YoungBitmap.from_gfns(0x100, N_PAGES, gfns, provenance=times)
            writer.append(young, residency=WindowResidency(words, dict.fromkeys(EVENTS, 0)))
    with YoungRecord.open(tmp_path / "r") as found:
        yield found


def test_a_view_of_the_used_parts_has_their_cells(idle):
    view = used_view(idle)
    assert view.parts.ranges == ((512, 1024), (29_696, 30_208), (49_664, 50_688))
    pages = [page for low, high in view.parts.ranges for page in range(low, high)]
    truth = np.zeros((70, len(pages)), dtype=np.int64)
    for w in range(70):
        for page in (700 + w, 50_000 + 3 * w):
            truth[w, pages.index(page)] = 1
    assert np.array_equal(view.bit_counts((0,), 0, 70)[0], truth)
    for level in (3, 6, 9, 12):
        starts = range(0, len(pages), 1 << level)
        sums = np.stack([truth[:, at : at + (1 << level)].sum(axis=1) for at in starts], axis=1)
        assert np.array_equal(view.counts(level, 0, 70), sums), level
    assert sum(heatmap_of(view).young_pages()) == pytest.approx(140)
    assert build_pyramid(view, 1 << 30).left_out == []
    assert used_view(idle, 0, 1).parts.ranges[-1] == (49_664, 50_176)


def test_the_picture_names_gfns_behind_a_cut(idle, tmp_path):
    pytest.importorskip("matplotlib")
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        render_heatmap(heatmap_of(used_view(idle)), tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    for words in (f"{0x100 + 49_664:#x}", "112.0 MiB without a young page left out", "left out:"):
        assert words in text
    assert ">0x8000<" not in text
