"""What a record says of its VM, against counting page by page."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from young_model import SECOND, Window, write

from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.errors import LayoutError
from kvmhost.reclaim.analyse import analysis, patterns
from kvmhost.reclaim.record.clock import elapsed_s, find_jumps, interval_s
from kvmhost.reclaim.record.meta import UPPER, RecordSession
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.writer import RecordWriter

N_PAGES = 200


@st.composite
def lists(draw, max_windows=70):
    n = draw(st.integers(1, max_windows))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = rng.random(N_PAGES) ** 4
    return [np.flatnonzero(rng.random(N_PAGES) < share).tolist() for _ in range(n)]


@pytest.fixture
def record_of(tmp_path_factory):
    opened = []

    def run(rows, gfn_start=0):
        path = tmp_path_factory.mktemp("record") / "r"
        windows = [
            Window(
                N_PAGES, frozenset(g + gfn_start for g in row), None, i * SECOND, (i + 1) * SECOND
            )
            for i, row in enumerate(rows)
        ]
        write(path, gfn_start, windows, N_PAGES).close()
        opened.append(YoungRecord.open(path))
        return opened[-1]

    yield run
    for record in opened:
        record.close()


FEW = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def since_of(rows, gfn, now):
    """Windows since a page was last young, now being 1; None if never."""
    return next((now - t + 1 for t in range(now, -1, -1) if gfn in rows[t]), None)


@given(lists(), st.integers(1, 80), st.tuples(st.integers(0, 150), st.integers(1, 50)))
@FEW
def test_working_set(record_of, rows, windows, part):
    record = record_of(rows)
    exact = analysis.nearest_window(windows)
    low, size = part
    for gfns in (None, (low, low + size)):
        found = analysis.histograms(record, gfns=gfns)
        inside = range(*(gfns or (0, N_PAGES)))
        for now, got in enumerate(analysis.working_set(found, windows)):
            recent = set().union(*rows[max(now - exact + 1, 0) : now + 1])
            assert got == sum(g in recent for g in inside)
        ages = [since_of(rows, g, len(rows) - 1) for g in inside]
        table = analysis.age_table(found)
        assert table[0] == ages.count(None)
        assert table[1:9].tolist() == [ages.count(k) for k in range(1, 9)]


@given(lists(), st.integers(0, 30))
@FEW
def test_promotion_curve(record_of, rows, first):
    first = min(first, len(rows))
    curve = analysis.promotion_curve(analysis.histograms(record_of(rows), first))
    by_windows = {threshold.windows: threshold for threshold in curve}
    for w in (1, 2, 5, 20):
        counted = [t for t in range(first, len(rows)) if t > w]
        assert (w in by_windows) == bool(counted)
        if not counted:
            continue
        promoted = cold = 0
        for t in counted:
            before = [since_of(rows, g, t - 1) for g in range(N_PAGES)]
            promoted += sum(before[g] is not None and before[g] > w for g in rows[t])
            now = [since_of(rows, g, t) for g in range(N_PAGES)]
            cold += sum(k is None or k > w for k in now)
        got = by_windows[w]
        assert got.promotions_per_min == pytest.approx(promoted / len(counted) * 60)
        assert got.cold_pages == pytest.approx(cold / len(counted))
        hot = N_PAGES - cold / len(counted)
        assert got.promotion_rate == pytest.approx(promoted / len(counted) * 60 / max(hot, 1))


def test_saving_at_a_target(record_of):
    # Pages 0-49 always, 50-99 every tenth window, the others never.
    rows = [[*range(50), *(range(50, 100) if t % 10 == 0 else ())] for t in range(60)]
    found = analysis.histograms(record_of(rows))
    saving = analysis.predict_saving(found, 0.0)
    assert saving.threshold.windows == 10
    assert saving.saved_pages == N_PAGES - 100
    cheap = analysis.predict_saving(found, 100.0)
    assert cheap.threshold.windows == 1
    assert analysis.predict_saving(analysis.histograms(record_of(rows[:2])), 0.0) is None


def lru_misses(rows, size):
    """Misses of an LRU memory; within a window pages come in ascending order."""
    stack, misses = [], 0
    for gfn in itertools.chain.from_iterable(sorted(row) for row in rows):
        if gfn in stack:
            misses += stack.index(gfn) >= size
            stack.remove(gfn)
        else:
            misses += 1
        stack.insert(0, gfn)
    return misses


def test_miss_ratio_curve_against_a_real_lru(record_of):
    rng = np.random.default_rng(3)
    weight = 1 / (1 + np.arange(N_PAGES))
    rows = [
        np.unique(rng.choice(N_PAGES, 12, p=weight / weight.sum())).tolist() for _ in range(400)
    ]
    sizes, ratios = analysis.miss_ratio_curve(analysis.histograms(record_of(rows)))
    assert (np.diff(sizes) >= 0).all()
    assert (np.diff(ratios) <= 1e-12).all()
    assert ratios[0] == 1.0
    touches = sum(map(len, rows))
    assert ratios[-1] == pytest.approx(len(set().union(*rows)) / touches)
    for size in (15, 30, 60, 100, 150):
        predicted = np.interp(size, sizes, ratios)
        assert predicted == pytest.approx(lru_misses(rows, size) / touches, abs=0.08)


def test_hot_ranges(record_of):
    rows = [[*range(10, 20), 25, *(range(100, 110) if t % 2 else ()), 150 + t] for t in range(10)]
    record = record_of(rows, gfn_start=0x400)
    ranges = patterns.hot_ranges(record, min_share=0.9)
    assert [(r.gfn_start - 0x400, r.gfn_end - 0x400, r.density) for r in ranges] == [
        (10, 20, 1.0),
        (25, 26, 1.0),
    ]
    merged = patterns.hot_ranges(record, min_share=0.9, max_gap_pages=5)
    assert [(r.gfn_start - 0x400, r.n_pages, r.hot_pages) for r in merged] == [(10, 16, 11)]
    assert merged[0].density == pytest.approx(11 / 16)
    half = patterns.hot_ranges(record, min_share=0.5)
    assert half[-1].gfn_start - 0x400 == 100
    assert half[-1].density == 0.5
    assert patterns.hot_ranges(record, 0, 0) == []
    with pytest.raises(LayoutError):
        patterns.hot_ranges(record, min_share=0)


def test_phases(make_record):
    first = range(1000)
    second = range(5000, 7000)
    lists = [first] * 20 + [second] * 30 + [first] * 20
    found = patterns.find_phases(make_record(lists, n_pages=10000))
    assert [(p.first, p.end) for p in found] == [(0, 20), (20, 50), (50, 70)]
    assert [p.young_pages for p in found] == [1000, 2000, 1000]
    assert found[1].change == 1.0
    steady = patterns.find_phases(make_record([first] * 30, n_pages=10000, name="s"))
    assert [(p.first, p.end) for p in steady] == [(0, 30)]
    assert patterns.find_phases(make_record([], name="e")) == []


@given(lists(max_windows=140))
@FEW
def test_windows_and_their_neighbours(record_of, rows):
    record = record_of(rows)
    wanted = [len(set(a) & set(b)) for a, b in itertools.pairwise(rows)]
    assert patterns.common_with_next(record).tolist() == wanted
    jaccard = [len(set(a) & set(b)) / (len(set(a) | set(b)) or 1) if set(a) | set(b) else 1.0
               for a, b in itertools.pairwise(rows)]  # fmt: skip
    assert patterns.jaccard_of_neighbours(record).tolist() == pytest.approx(jaccard)


@given(st.sets(st.integers(0, 99)), st.sets(st.integers(50, 170)))
def test_similarity(a, b):
    found = patterns.similarity(
        YoungBitmap.from_gfns(0, 100, sorted(a)), YoungBitmap.from_gfns(50, 121, sorted(b))
    )
    assert (found.a_pages, found.b_pages, found.both_pages) == (len(a), len(b), len(a & b))
    assert found.jaccard == (len(a & b) / len(a | b) if a | b else 1.0)
    assert set(np.flatnonzero(found.only_a)) == a - b
    assert set(np.flatnonzero(found.only_b)) == b - a


def write_times(path, times, boots=()):
    with RecordWriter.create(
        path, 8, session=RecordSession(0, "t", "f", SECOND, "boot0")
    ) as writer:
        for number, (end_ns, wall_ns) in enumerate(times):
            if number in boots:
                writer.set_session(RecordSession(0, "t", "f", SECOND, f"boot{number}"))
            source = Provenance("t", "f", max(end_ns - SECOND, 0), end_ns)
            writer.append(YoungBitmap.from_gfns(0, 8, [1], provenance=source), wall_ns=wall_ns)
    return YoungRecord.open(path)


def test_the_time_axis_only_goes_forward(tmp_path):
    s, w = SECOND, 10**18
    times = [
        (10 * s, w + 10 * s),
        (11 * s, w + 11 * s),
        (12 * s, w + 5 * s),  # the wall clock was set back
        (30 * s, w + 23 * s),  # nobody recorded for a while
        (2 * s, w + 83 * s),  # after a reboot, a minute later
        (1 * s, 0),  # a monotonic clock that goes back, and no other
    ]
    with write_times(tmp_path / "r", times, boots={4}) as record:
        assert interval_s(record) == 1.0
        assert elapsed_s(record).tolist() == [1, 2, 3, 21, 81, 82]
        jumps = find_jumps(record)
        assert [jump.window for jump in jumps] == [2, 4, 5]
        assert jumps[0].wall_s == -6.0


def test_upper_bounds_of_buckets():
    assert UPPER[:66].tolist() == [*range(65), 72]
    assert (np.diff(UPPER) > 0).all()
    assert UPPER[-1] == 1 << 24
    assert [analysis.nearest_window(w) for w in (1, 60, 64, 70, 600, 1e9)] == [
        1, 60, 64, 72, 576, 1 << 24,
    ]  # fmt: skip
    for bad in (0, -1, float("nan")):
        with pytest.raises(LayoutError):
            analysis.nearest_window(bad)


def test_repr_of_histograms(make_record):
    found = analysis.histograms(make_record([[1], [2], [1]]), 1)
    assert repr(found) == "Histograms(windows [1, 3) of 1 s, 256 pages)"
