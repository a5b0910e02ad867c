"""Residency in pictures: the shares behind them against brute force, and that they are drawn."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from pyramids import cells_of, grouped
from young_model import SECOND

from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.reclaim.draw import heatmaptiles
from kvmhost.reclaim.draw.heatmapdata import RecordView, heatmap_of
from kvmhost.reclaim.draw.heatmaphtml import write_html
from kvmhost.reclaim.draw.heatmaplayers import layers_of
from kvmhost.reclaim.draw.parts import PageParts
from kvmhost.reclaim.draw.registry import draw_record
from kvmhost.reclaim.draw.render import render_heatmap
from kvmhost.reclaim.record.meta import EVENTS, STATES
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.residency import WindowResidency
from kvmhost.reclaim.record.writer import RecordWriter

pytest.importorskip("zstandard")

N_PAGES, N_WINDOWS = 1024, 30
#: Pages of each window; residency is unknown in the first two.
WINDOWS = [
    {
        "resident": range(512 - 8 * w),
        "evicted": range(512 - 8 * w, 512),
        "evicted_daemon": range(512 - 8 * w, 516 - 8 * w),
        "evicted_limit": range(516 - 8 * w, 520 - 8 * w),
        "refaulted": range(3 * w, 3 * w + 2),
    }
    for w in range(N_WINDOWS)
]


def bits(gfns: range) -> np.ndarray:
    return YoungBitmap.from_gfns(0, N_PAGES, list(gfns)).words


@pytest.fixture
def record(tmp_path: Path):
    with RecordWriter.create(tmp_path / "r", N_PAGES) as writer:
        for w, window in enumerate(WINDOWS):
            times = Provenance("dirty", "npt", (w + 1) * SECOND, (w + 2) * SECOND)
            words = {name: bits(window.get(name, range(0))) for name in (*STATES, *EVENTS)}
            counts = {name: 3 * len(window.get(name, ())) for name in EVENTS}
            residency = WindowResidency(words, counts) if w >= 2 else None
            young = YoungBitmap.from_gfns(0, N_PAGES, [w], provenance=times)
            writer.append(young, residency=residency)
    with YoungRecord.open(tmp_path / "r") as found:
        yield found


def test_layers_are_the_shares_of_bins(record):
    """Columns of one window, and of several: shares only of those that are known."""
    for n_columns, groups in (
        (100, [range(w, w + 1) for w in range(N_WINDOWS)]),
        (10, [range(w, w + 3) for w in range(0, N_WINDOWS, 3)]),
    ):
        layers = heatmap_of(RecordView(record), n_bins=64, n_columns=n_columns).layers
        for at, group in enumerate(groups):
            known = [w for w in group if w >= 2]
            for name in STATES:
                found = getattr(layers, name)[at]
                if not known:
                    assert np.isnan(found).all()
                    continue
                pages = np.zeros(N_PAGES)
                for w in known:
                    pages[list(WINDOWS[w][name])] += 1
                assert found == pytest.approx(pages.reshape(64, 16).mean(axis=1) / len(known))
            evicted, refaulted = np.zeros(N_PAGES), np.zeros(N_PAGES)
            for w in known:
                for name in ("evicted_daemon", "evicted_limit"):
                    evicted[list(WINDOWS[w][name])] += 1
                refaulted[list(WINDOWS[w]["refaulted"])] += 1
            sums = evicted.reshape(64, 16).sum(axis=1)
            assert layers.moved["evictions"][at].tolist() == sums.tolist()
            assert layers.moved["refaults"][at].sum() == refaulted.sum()
            assert layers.events["evicted_daemon"][at] == 12 * len(known)
            assert layers.events["dropped"][at] == 0


def truth_of(name: str, pages: range) -> np.ndarray:
    """Return shape (pages, windows): the bits of an array, from the model alone."""
    found = np.zeros((N_PAGES, N_WINDOWS), dtype=np.int64)
    for w in range(2, N_WINDOWS):
        found[list(WINDOWS[w].get(name, ())), w] = 1
    return found[list(pages)]


@pytest.mark.parametrize(
    "pages", [range(N_PAGES), range(128, 640), [*range(512), *range(960, 1024)]]
)
@pytest.mark.parametrize("top_cells", [512, 2])
def test_pyramids_of_layers_are_what_brute_force_counts(record, monkeypatch, pages, top_cells):
    """Whole, a part that is not aligned to the record's sums, and two parts."""
    monkeypatch.setattr(heatmaptiles, "_TOP_CELLS", top_cells)
    if isinstance(pages, range):
        view = RecordView(record, gfns=(pages.start, pages.stop))
    else:
        view = RecordView(record, parts=PageParts(((0, 512), (960, 1024))))
    layers = layers_of(view, 1 << 20)
    shown = [*STATES, "evicted_daemon", "evicted_limit", "refaulted"]
    assert list(layers.pyramids) == shown
    assert list(layers.curves) == ["young", *shown]
    for name in STATES:
        assert layers.curves[name].tolist() == truth_of(name, pages).sum(axis=0).tolist()
    young = [int(w in pages) for w in range(N_WINDOWS)]
    assert layers.curves["young"].tolist() == young
    assert layers.curves["refaulted"].tolist() == [0, 0, *[6] * 28]
    for name, pyramid in layers.pyramids.items():
        assert pyramid.left_out == []
        truth = truth_of(name, pages)
        for steps in pyramid.levels.values():
            for step in steps:
                cells = cells_of(step)
                wanted = grouped(truth, 1 << step.level, 1 << step.step)
                assert np.array_equal(cells, wanted), (name, step.level, step.step)
    levels = layers.pyramids["resident"].levels
    assert set(levels) == ({0} if top_cells == 512 and len(pages) <= 512 else set(levels))
    assert (9 in levels) == (top_cells == 2)


def test_layers_that_are_too_large_are_left_out_and_the_page_says_so(record, monkeypatch):
    monkeypatch.setattr(heatmaptiles, "_MOST_UNPACKED_BYTES", 1)
    layers = layers_of(RecordView(record), 1 << 20)
    assert layers.pyramids == {}
    assert layers.left_out[:2] == list(STATES)
    out = io.BytesIO()
    write_html(RecordView(record), out)
    (text,) = re.findall(rb'id="meta">(.*?)</script>', out.getvalue())
    meta = json.loads(text)
    assert meta["layersLeftOut"] == layers.left_out
    assert "residency unknown" not in " ".join(meta["notes"])


def test_a_small_budget_leaves_out_the_finest_cells_of_layers(record, monkeypatch):
    monkeypatch.setattr(heatmaptiles, "_TOP_CELLS", 2)
    for name, pyramid in layers_of(RecordView(record), 10).pyramids.items():
        assert len(pyramid.levels) == 1, name
        assert pyramid.left_out


def test_a_state_has_its_colour(record, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    render_heatmap(heatmap_of(RecordView(record)), tmp_path / "x.png")
    drawn = (image.imread(tmp_path / "x.png")[:, :, :3] * 255).round().astype(int).reshape(-1, 3)
    for colour in ((0xFD, 0xC6, 0x8A), (0xDA, 0xDA, 0xDA)):
        assert (np.abs(drawn - colour).max(axis=1) <= 1).sum() > 20_000, colour
    text = tmp_path / "x.svg"
    render_heatmap(heatmap_of(RecordView(record)), text)
    assert "#d40f7d" in text.read_text()


@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_every_picture_says_what_its_tracker_does_not_see(record, tmp_path, suffix):
    """PNG and PDF are drawn by the code that draws SVG, whose text can be read."""
    mpl = pytest.importorskip("matplotlib")
    with mpl.rc_context({"svg.fonttype": "none"}):
        draw_record(RecordView(record), tmp_path / f"x{suffix}")
    assert "reads are not seen" in (tmp_path / f"x{suffix}").read_text()
    if suffix == ".svg":
        assert "none: where most pages are" in (tmp_path / "x.svg").read_text()


def test_a_record_without_residency_says_so(make_record):
    record = make_record([[1], [2, 3]])
    heatmap = heatmap_of(RecordView(record))
    assert heatmap.layers is None
    assert "residency unknown" in heatmap.caption
    assert heatmap.young_pages().tolist() == [1, 2]
