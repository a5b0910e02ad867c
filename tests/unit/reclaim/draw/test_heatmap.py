"""Pictures of records: the counts behind them against brute force, and golden images."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyramids import cells_of, grouped
from young_model import SECOND, Window, histories, write

from kvmhost.errors import LayoutError
from kvmhost.reclaim.draw import heatmaptiles
from kvmhost.reclaim.draw.heatmapdata import RecordView, heatmap_of, timeline_of
from kvmhost.reclaim.draw.heatmaphtml import draw_record, write_html
from kvmhost.reclaim.draw.heatmaptiles import build_pyramid, cell_bits
from kvmhost.reclaim.draw.render import render_heatmap
from kvmhost.reclaim.record.meta import Memslot, RecordSession
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.writer import RecordWriter

GOLDEN = Path(__file__).parent / "golden"
#: Make them anew: GOLDEN_WRITE=1 pytest tests/unit/reclaim/young/test_heatmap.py
REWRITE = bool(os.environ.get("GOLDEN_WRITE"))


def matrix_of(windows, gfn_start, low, high):
    """Return shape (pages, windows) of booleans, from the model alone."""
    found = np.zeros((high - low, len(windows)), dtype=np.int64)
    for at, window in enumerate(windows):
        for gfn in window.gfns:
            if low <= gfn - gfn_start < high:
                found[gfn - gfn_start - low, at] = 1
    return found


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories(max_windows=90, max_pages=600), st.data())
def test_cells_are_what_brute_force_counts_and_children_add_up(history, data):
    gfn_start, windows = history
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        # So that small records have many levels.
        patch.setattr(heatmaptiles, "_TOP_CELLS", 2)
        write(Path(place) / "r", gfn_start, windows).close()
        with YoungRecord.open(Path(place) / "r") as record:
            if not record.n_pages or not windows:
                with pytest.raises(LayoutError):
                    RecordView(record)
                return
            first = data.draw(st.integers(0, len(windows) - 1))
            end = data.draw(st.integers(first + 1, len(windows)))
            low = data.draw(st.integers(0, record.n_pages - 1))
            high = data.draw(st.integers(low + 1, record.n_pages))
            view = RecordView(record, first, end, (gfn_start + low, gfn_start + high))
            assert view.low <= low
            assert view.high >= high
            assert view.n_pages < high - low + 128
            pyramid = build_pyramid(view, 1 << 30)
            assert pyramid.left_out == []
            truth = matrix_of(windows[first:end], gfn_start, view.low, view.high)
            found = {
                (step.level, step.step): cells_of(step)
                for steps in pyramid.levels.values()
                for step in steps
            }
    assert {(0, 0), (3, 0)} <= found.keys() or view.n_pages <= 2
    for (level, step), cells in found.items():
        assert (cells == grouped(truth, 1 << level, 1 << step)).all(), (level, step)
        if (level - 3, step) in found:
            assert (cells == grouped(found[level - 3, step], 8, 1)).all()
        if (level, step - 3) in found:
            assert (cells == grouped(found[level, step - 3], 1, 8)).all()


def test_levels_from_the_records_sums(tmp_path, monkeypatch):
    """Above 512 pages a bin nothing is counted from bits, and the counts are the same."""
    rng = np.random.default_rng(2)
    n_pages = 40_000
    windows = [
        Window(
            n_pages,
            frozenset((0x400 + rng.integers(0, n_pages, 3000)).tolist()),
            None,
            i * 10,
            i * 10 + 9,
        )
        for i in range(1, 80)
    ]
    write(tmp_path / "r", 0x400, windows).close()
    with YoungRecord.open(tmp_path / "r") as record:
        view = RecordView(record)
        truth = matrix_of(windows, 0x400, 0, n_pages)
        assert (truth[:, 3:77] == view.counts(0, 3, 77).T).all()
        for level in (6, 9, 12, 15, 18):
            counts = view.counts(level, 3, 77)
            assert (grouped(truth[:, 3:77], 1 << level, 1) == counts.T).all(), level
        # A part inside the record that is aligned to its finest sums only.
        low, high = 512 * 3, 512 * 70
        part = RecordView(record, gfns=(0x400 + low, 0x400 + high))
        assert (part.low, part.high) == (low, high)
        for level in (6, 9, 12, 15):
            expected = grouped(truth[low:high, 3:77], 1 << level, 1)
            assert np.array_equal(part.counts(level, 3, 77).T, expected), level
        monkeypatch.setattr(YoungRecord, "blocks", None)
        assert view.counts(12, 0, 79).sum() == truth.sum()


def test_a_range_starts_at_whole_words_or_sums(tmp_path):
    write(tmp_path / "r", 5, [Window(50_000, frozenset([6, 7]), None, 10, 20)]).close()
    with YoungRecord.open(tmp_path / "r") as record:
        assert (RecordView(record, gfns=(5 + 70, 5 + 80)).low, RecordView(record).high) == (
            64,
            50_000,
        )
        wide = RecordView(record, gfns=(5 + 600, 5 + 45_000))
        assert (wide.low, wide.high) == (512, 45_056)
        for bad in ((4, 10), (10, 50_006), (10, 10)):
            with pytest.raises(LayoutError, match="out of range"):
                RecordView(record, gfns=bad)
        with pytest.raises(LayoutError, match="no windows"):
            RecordView(record, 1, 1)


def test_cells_are_wide_enough_for_their_counts():
    for level in range(0, 31, 3):
        for step in range(0, 22, 3):
            most, bits = 1 << (level + step), cell_bits(level, step)
            assert most <= (2**53 if bits == 64 else 2**bits - 1)


def test_what_does_not_fit_the_budget_is_left_out(tmp_path):
    rng = np.random.default_rng(1)
    windows = [
        Window(9000, frozenset(np.flatnonzero(rng.random(9000) < 0.5).tolist()), None, i, i + 1)
        for i in range(1, 70)
    ]
    write(tmp_path / "r", 0, windows).close()
    with YoungRecord.open(tmp_path / "r") as record:
        view = RecordView(record)
        whole = build_pyramid(view, 1 << 30)
        sizes = {
            level: sum(step.n_bytes for step in steps) for level, steps in whole.levels.items()
        }
        assert next(iter(whole.levels)) == max(sizes)
        for most in (1, sizes[6] + sizes[3] + 10, whole.n_bytes - 1, whole.n_bytes):
            found = build_pyramid(view, most)
            assert max(sizes) in found.levels
            assert sorted([*found.levels, *found.left_out]) == sorted(sizes)
            assert not found.left_out or max(found.left_out) < min(found.levels)
            assert found.n_bytes <= max(most, sizes[max(sizes)])
        assert build_pyramid(view, whole.n_bytes * 2).left_out == []
        out = io.BytesIO()
        small = write_html(view, out, 20_000)
        assert 0 in small.left_out
        assert len(out.getvalue()) < 20_000 + 60_000


def test_guests_above_a_gibibyte_have_each_page_in_its_place(tmp_path):
    """Bits are read in stripes of 1 GiB: here two and a part of a third."""
    n_pages = (2 << 18) + 5000
    young = [3, (1 << 18) - 1, 1 << 18, (1 << 18) + 70, (2 << 18) - 9, 2 << 18, n_pages - 1]
    gfns = [frozenset(young), frozenset(young[::2])]
    windows = [Window(n_pages, found, None, i + 1, i + 2) for i, found in enumerate(gfns)]
    write(tmp_path / "r", 0, windows).close()
    with YoungRecord.open(tmp_path / "r") as record:
        pyramid = build_pyramid(RecordView(record), 1 << 30)
    assert pyramid.left_out == []
    for level, steps in pyramid.levels.items():
        cells = cells_of(steps[0])
        expected = np.zeros_like(cells)
        for at, found in enumerate(gfns):
            np.add.at(expected[:, at], np.array(sorted(found)) >> level, 1)
        assert np.array_equal(cells, expected), level


def test_only_the_parts_of_a_record_that_a_view_reads_count_against_its_budget(tmp_path):
    """Noise in all pages and windows; the views are its corners."""
    rng = np.random.default_rng(7)
    n_pages, n_windows = (1 << 18) + 50_000, 130
    noise = [
        Window(n_pages, frozenset(rng.integers(0, n_pages, 2000).tolist()), None, i, i + 1)
        for i in range(1, n_windows + 1)
    ]
    write(tmp_path / "r", 0, noise).close()
    with YoungRecord.open(tmp_path / "r") as record:
        files = [f.stat().st_size for f in (record.path / "young").iterdir() if f.name[0].isdigit()]
        assert record.metadata.chunk_pages < n_pages
        # Bits are read if they take up to twice the budget.
        most = max(files) // 2 + 1
        assert sum(files) > 4 * most
        for gfns in ((0, 4096), (n_pages - 4096, n_pages)):
            for first, end in ((0, 10), (n_windows - 1, n_windows)):
                pyramid = build_pyramid(RecordView(record, first, end, gfns), most)
                # The coarsest level is always there; the others only if they fit.
                assert pyramid.left_out == []
                assert len(pyramid.levels) > 1


# -- the time axis -------------------------------------------------------------


def eventful(path, name="vm1", n_pages=4096, n_windows=96):
    """A record with two memslots, a gap, a jump of the wall clock and a change of tracker."""
    slots = [Memslot(0, 0, 1024), Memslot(1, 1024, n_pages - 1024)]
    session = RecordSession(
        0, "guestpt", "npt", SECOND, "boot", {"image": "/x/hot.elf", "kernel": "6.1"}
    )
    clock, wall = 5 * SECOND, 1_780_000_000 * SECOND
    with RecordWriter.create(path, n_pages, name=name, memslots=slots, session=session) as writer:
        for i in range(n_windows):
            clock += 12 * SECOND if i == 40 else 0
            wall += (12 if i == 40 else 0) * SECOND + (3600 * SECOND if i == 60 else 0)
            hot = range(1500, 1500 + 300) if i < 70 else range(2600, 2600 + 300)
            gfns = frozenset([*range(64), *hot, *range(40 * i, 40 * i + 16)])
            tracker = "guestpt" if i < 80 else "pagemap"
            window = Window(n_pages, gfns, None, clock, clock + SECOND, tracker)
            clock, wall = clock + SECOND, wall + SECOND
            writer.append(window.bitmap(0), wall_ns=wall)
    return path


def test_gaps_jumps_and_trackers_are_on_the_time_axis(tmp_path):
    with YoungRecord.open(eventful(tmp_path / "r")) as record:
        times = timeline_of(RecordView(record))
        assert [(mark.window, mark.text) for mark in times.marks] == [
            (40, "gap of 12 s"),
            (60, "clock jump of 60 min"),
            (80, "by pagemap (npt)"),
        ]
        assert times.starts_s[0] == 0
        assert (np.diff(times.ends_s) > 0).all()
        assert (times.starts_s[1:] >= times.ends_s[:-1] - 1e-9).all()
        assert times.starts_s[40] == pytest.approx(times.ends_s[39] + 12)
        part = timeline_of(RecordView(record, 50, 70))
        assert [mark.window for mark in part.marks] == [60]
        assert part.starts_s[0] == 0


def test_columns_of_a_picture_are_means_and_never_cross_a_gap(tmp_path):
    with YoungRecord.open(eventful(tmp_path / "r")) as record:
        heatmap = heatmap_of(RecordView(record), n_bins=64, n_columns=10)
        windows = [np.asarray(b.as_bool()) for b in record.bitmaps()]
    firsts = [*range(0, 40, 10), *range(40, 96, 10)]
    assert len(heatmap.columns) == len(firsts)
    for column, (a, b) in zip(
        heatmap.columns, zip(firsts, [*firsts[1:], 96], strict=True), strict=True
    ):
        expected = np.mean(windows[a:b], axis=0).reshape(64, -1).mean(axis=1)
        assert column == pytest.approx(expected, abs=1e-6)
    assert "10 per column" in heatmap.caption
    with YoungRecord.open(tmp_path / "r") as record:
        assert "per column" not in heatmap_of(RecordView(record), n_columns=96).caption


# -- pictures ------------------------------------------------------------------


def blocks_of(image):
    """Return an image as means of 20 by 20 pixels, for which fonts hardly matter."""
    height, width = (size // 20 * 20 for size in image.shape[:2])
    rgb = image[:height, :width, :3]
    return rgb.reshape(height // 20, 20, width // 20, 20, 3).mean(axis=(1, 3))


@pytest.mark.parametrize("name", ["whole", "part"])
def test_pictures_are_like_the_golden_ones(tmp_path, name):
    image = pytest.importorskip("matplotlib.image")
    out = tmp_path / "x.png"
    with YoungRecord.open(eventful(tmp_path / "r")) as record:
        view = RecordView(record) if name == "whole" else RecordView(record, 30, 50, (1400, 1900))
        render_heatmap(heatmap_of(view), out)
    golden = GOLDEN / f"heatmap_{name}.png"
    if REWRITE:
        golden.write_bytes(out.read_bytes())
    found, wanted = blocks_of(image.imread(out)), blocks_of(image.imread(golden))
    assert found.shape == wanted.shape
    differences = np.abs(found - wanted).max(axis=2)
    assert differences.mean() < 0.01
    assert np.quantile(differences, 0.98) < 0.1


HOSTILE = "</script><img src=x onerror=alert(1)>$\\frac{$ @META@ \x1b[31m \u202e \x00 --> <!--"


def test_hostile_names_do_no_harm(tmp_path):
    pytest.importorskip("matplotlib")
    with YoungRecord.open(eventful(tmp_path / "r", HOSTILE, n_windows=4)) as record:
        for kind in (".png", ".svg"):
            render_heatmap(heatmap_of(RecordView(record)), tmp_path / f"x{kind}")
        assert b"onerror=alert(1)>" not in (tmp_path / "x.svg").read_bytes()
        out = io.BytesIO()
        write_html(RecordView(record), out)
    page = out.getvalue().decode()
    assert "<img" not in page
    assert "<!--" not in page
    assert len(re.findall("<script", page)) == len(re.findall("</script>", page))
    meta = re.search(r'<script type="application/json" id="meta">(.*?)</script>', page)
    assert json.loads(meta[1])["name"] == HOSTILE


def test_what_is_said_of_a_page(tmp_path):
    """Windows, the finest cells, how to see finer ones, and the size of the file."""
    rng = np.random.default_rng(3)
    windows = [
        Window(1 << 18, frozenset(rng.integers(0, 1 << 18, 20_000).tolist()), None, i, i + 1)
        for i in range(1, 71)
    ]
    write(tmp_path / "r", 0, windows).close()
    out = tmp_path / "x.html"
    with YoungRecord.open(tmp_path / "r") as record:
        said = draw_record(RecordView(record), out, 1 << 20)
        size = f"({out.stat().st_size / 1048576:.1f} MiB)"
        found = re.fullmatch(
            r"70 windows, down to (\d+) pages per cell: finer cells exceed "
            r"--max-size 1M; draw a part \(--range, --windows\) to see them (.*)",
            said,
        )
        assert found, said
        assert int(found[1]) in (8, 64, 512, 4096)
        assert found[2] == size
        said = draw_record(RecordView(record, 0, 5, (0, 640)), out, 1 << 20)
        assert said.startswith("5 windows, down to single gfns (")


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    with YoungRecord.open(eventful(tmp_path / "r", n_windows=70)) as record:
        out = io.BytesIO()
        write_html(RecordView(record), out)
    page = out.getvalue().decode()
    assert not re.search(r"https?://|//cdn|@import|url\(|src=|href=", page)
    assert "default-src 'none'" in page
    assert not re.search(r"@[A-Z_]+@", page)
    letters = re.search(r'id="times">([^<]*)<', page)[1]
    raw = zlib.decompress(base64.b64decode(letters))
    assert len(raw) == 3 * 8 * 70
