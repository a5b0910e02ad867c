from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.reclaim.draw.heatmap import Heatmap, bin_edges, bin_shares
from kvmhost.reclaim.draw.render import render_heatmap


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 600), st.data())
def test_bins_cover_every_page_once(n_pages, n_bins, data):
    edges = bin_edges(n_pages, n_bins)
    assert edges[0] == 0
    assert edges[-1] == n_pages
    assert (np.diff(edges) >= 1).all()
    assert edges.size - 1 == min(n_pages, n_bins)
    young = np.array(data.draw(st.lists(st.booleans(), min_size=n_pages, max_size=n_pages)))
    shares = bin_shares(young, edges)
    expected = [young[a:b].mean() for a, b in itertools.pairwise(edges)]
    assert shares == pytest.approx(expected)


@pytest.mark.parametrize(("pages", "bins"), [(0, 5), (5, 0), (-1, 1)])
def test_no_bins(pages, bins):
    with pytest.raises(LayoutError):
        bin_edges(pages, bins)


def bitmap(*gfns, start=0x400, pages=256):
    return YoungBitmap.from_gfns(start, pages, gfns, provenance=Provenance("guestpt", "npt"))


def test_windows_have_to_be_in_order_and_of_one_range():
    heatmap = Heatmap(0x400, 256, 4)
    heatmap.add(bitmap(0x400), 10, 20)
    heatmap.add(bitmap(0x4FF, 0x4C0), 20, 30)
    assert heatmap.shares().tolist() == [[1 / 64, 0], [0, 0], [0, 0], [0, 2 / 64]]
    with pytest.raises(LayoutError, match="out of order"):
        heatmap.add(bitmap(), 25, 40)
    with pytest.raises(LayoutError, match="out of order"):
        heatmap.add(bitmap(), 40, 40)
    with pytest.raises(LayoutError, match="another range"):
        heatmap.add(bitmap(start=0x400, pages=255), 50, 60)


def drawn():
    heatmap = Heatmap(0x400, 256, 16, title="a title")
    for number in range(8):
        young = [*range(0x440, 0x480), 0x400 + 20 * number]
        start_ns = (number + (number > 4)) * 10**8  # a gap before the fifth
        heatmap.add(bitmap(*young), start_ns, start_ns + 10**8)
    return heatmap


def test_the_picture_shows_hot_rows_dark_and_untouched_ones_white(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "x.png"
    render_heatmap(drawn(), path)
    brightness = image.imread(path)[..., :3].mean(axis=2)
    height, width = brightness.shape
    # Rows of the map, below the curve: hot gfns are the second quarter from the bottom.
    column = brightness[:, int(width * 0.2)]
    dark = np.flatnonzero(column < 0.25)
    inner = dark[(dark > height * 0.3) & (dark < height * 0.9)]
    assert inner.size > height * 0.12
    assert np.ptp(inner) < height * 0.3
    assert inner.mean() > height * 0.5
    assert (column > 0.95).sum() > height * 0.4


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_other_kinds(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"x{suffix}"
    render_heatmap(drawn(), path)
    assert path.stat().st_size > 1000


def test_nothing_to_draw_and_unknown_kinds(tmp_path):
    with pytest.raises(LayoutError, match="no window"):
        render_heatmap(Heatmap(0, 16), tmp_path / "x.png")
    with pytest.raises(LayoutError, match=r"\.png"):
        render_heatmap(drawn(), tmp_path / "x.txt")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CapabilityError, match=r"\[plot\]"):
        render_heatmap(drawn(), tmp_path / "x.png")


def test_repr_of_a_heatmap():
    heatmap = Heatmap(0x400, 256, n_bins=16, title="VM a")
    heatmap.add(bitmap(0x401), 0, 10)
    assert repr(heatmap) == "Heatmap('VM a', 1 windows, gfns [0x400, 0x500) in 16 bins)"
