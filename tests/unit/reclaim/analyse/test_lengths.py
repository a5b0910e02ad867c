"""Windows of unequal lengths, with gaps: results weigh them by the time that they cover.

Expected values are computed page by page from the plain windows.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from young_model import SECOND, Window, write

from kvmhost.reclaim.analyse.analysis import (
    age_s,
    histograms,
    miss_ratio_curve,
    promotion_curve,
    working_set,
    working_set_over,
)
from kvmhost.reclaim.analyse.patterns import find_phases, hot_ranges
from kvmhost.reclaim.analyse.whatif import Case, run_case
from kvmhost.reclaim.record.clock import coverage_of, lengths_s, starts_s, weighted_mean
from kvmhost.reclaim.record.reader import YoungRecord

pytest.importorskip("zstandard")

N_PAGES = 130
FEW = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def uneven(draw: st.DrawFn) -> list[Window]:
    """Draw windows from 1/8 s to 4 s long, with gaps of up to 4 s between some."""
    n = draw(st.integers(1, 90))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.02, 0.3, 0.9]))
    clock, windows = 3 * SECOND, []
    for _ in range(n):
        clock += int(rng.choice([0, 0, 0, SECOND // 2, 4 * SECOND]))
        length = int(rng.integers(1, 33)) * SECOND // 8
        young = frozenset(np.flatnonzero(rng.random(N_PAGES) < density).tolist())
        windows.append(Window(N_PAGES, young, None, clock, clock + length))
        clock += length
    return windows


Opener = Callable[[list[Window]], YoungRecord]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    found: list[YoungRecord] = []

    def run(windows: list[Window]) -> YoungRecord:
        for record in found:
            record.close()
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
        write(tmp_path / "r", 0, windows).close()
        found.append(YoungRecord.open(tmp_path / "r"))
        return found[-1]

    yield run
    for record in found:
        record.close()


def length_of(window: Window) -> float:
    return (window.end_ns - window.start_ns) / 1e9


@given(windows=uneven())
@FEW
def test_times_of_windows(opened: Opener, windows: list[Window]) -> None:
    record = opened(windows)
    zero = windows[0].start_ns
    assert lengths_s(record).tolist() == pytest.approx([length_of(w) for w in windows])
    assert starts_s(record).tolist() == pytest.approx([(w.start_ns - zero) / 1e9 for w in windows])
    for first in (0, len(windows) // 2):
        part = windows[first:]
        found = coverage_of(record, first)
        covered, elapsed = sum(map(length_of, part)), (part[-1].end_ns - part[0].start_ns) / 1e9
        assert found.covered_s == pytest.approx(covered)
        assert found.share == pytest.approx(covered / elapsed)
        gaps = sum(b.start_ns > a.end_ns for a, b in itertools.pairwise(part))
        assert found.n_gaps == gaps
        assert (found.text == "") == (gaps == 0)


@given(windows=uneven(), share=st.sampled_from([0.05, 0.5, 0.75, 1.0]))
@FEW
def test_hot_is_a_share_of_the_time(opened: Opener, windows: list[Window], share: float) -> None:
    """Up to the rounding of lengths to 256ths of the usual one."""
    record = opened(windows)
    total = sum(map(length_of, windows))
    young_s = [sum(length_of(w) for w in windows if page in w.gfns) for page in range(N_PAGES)]
    found = hot_ranges(record, min_share=share)
    step = statistics.median(
        [(b.end_ns - a.end_ns) / 1e9 for a, b in itertools.pairwise(windows)] or [1.0]
    )
    slack = len(windows) * step / 256
    listed = {page for r in found for page in range(r.gfn_start, r.gfn_end)}
    for page, seconds in enumerate(young_s):
        if seconds - share * total > slack:
            assert page in listed
        if share * total - seconds > slack:
            assert page not in listed
    for r in found:
        density = statistics.fmean(young_s[r.gfn_start : r.gfn_end]) / total
        assert r.density == pytest.approx(density, abs=2 * slack / total)


@given(windows=uneven())
@FEW
def test_working_set_over_a_time(opened: Opener, windows: list[Window]) -> None:
    found = histograms(opened(windows))
    for seconds in (0.5, 2.0, 7.0):
        wanted = []
        for i, last in enumerate(windows):
            touched = set(last.gfns)
            for w in windows[:i]:
                if (w.start_ns + w.end_ns) / 2 >= last.end_ns - seconds * 1e9:
                    touched |= w.gfns
            wanted.append(len(touched))
        assert working_set_over(found, seconds).tolist() == wanted
    begin = [(windows[-1].end_ns - w.start_ns) / 1e9 for w in windows]
    for back in range(1, len(windows) + 1):
        assert age_s(found, back) == pytest.approx(begin[-back])


@given(windows=uneven())
@FEW
def test_promotions_are_per_covered_minute(opened: Opener, windows: list[Window]) -> None:
    for threshold in promotion_curve(histograms(opened(windows))):
        cold_for, part = threshold.windows, windows[threshold.windows + 1 :]
        lengths = [length_of(w) for w in part]
        last = dict.fromkeys(range(N_PAGES), -1)
        promoted, cold = 0, []
        for i, window in enumerate(windows):
            for page in window.gfns:
                if i > cold_for and last[page] >= 0 and i - last[page] > cold_for:
                    promoted += 1
                last[page] = i
            if i > cold_for:
                cold.append(sum(seen < 0 or i - seen >= cold_for for seen in last.values()))
        assert threshold.promotions_per_min == pytest.approx(promoted / (sum(lengths) / 60))
        assert threshold.cold_pages == pytest.approx(np.average(cold, weights=lengths))


def test_equal_windows_are_as_before(opened: Opener) -> None:
    windows = [
        Window(N_PAGES, frozenset(range(i, N_PAGES, i + 1)), None, i * SECOND + 1,
               (i + 1) * SECOND + 1)
        for i in range(70)
    ]  # fmt: skip
    record = opened(windows)
    found = histograms(record)
    assert found.step_s == 1.0
    assert coverage_of(record).text == ""
    for length in (1, 5, 60):
        assert working_set_over(found, length).tolist() == working_set(found, length).tolist()
    counts = record.between(0, None, "count")
    assert (record.weighted_counts(0, np.full(70, 256)) == 256 * counts.astype(int)).all()
    assert miss_ratio_curve(found)[0][-1] == pytest.approx(found.ages[:, 1:].sum(axis=1).mean(), 1)


def test_a_long_window_counts_for_more(opened: Opener) -> None:
    """One window of 9 s and nine of 1 s: the page of the long one is young half of the time."""
    windows = [Window(N_PAGES, frozenset({7}), None, SECOND, 10 * SECOND)]
    windows += [
        Window(N_PAGES, frozenset({9, 10}), None, t * SECOND, (t + 1) * SECOND)
        for t in range(10, 19)
    ]
    record = opened(windows)
    assert [(r.gfn_start, r.gfn_end) for r in hot_ranges(record)] == [(7, 8), (9, 11)]
    assert [round(r.density, 3) for r in hot_ranges(record)] == [0.5, 0.5]
    assert float(weighted_mean(record.column("n_young"), lengths_s(record))) == pytest.approx(1.5)
    (phase,) = find_phases(record, span=16)
    assert phase.young_pages == pytest.approx(1.5)


def test_a_record_beside_another_harvester_says_what_it_covers(opened: Opener) -> None:
    """Windows of 0.44 s each second: the others' harvests took the rest."""
    windows = [
        Window(N_PAGES, frozenset({t}), None, t * SECOND + 560_000_000, (t + 1) * SECOND)
        for t in range(50)
    ]
    found = coverage_of(opened(windows))
    assert found.n_gaps == 49
    assert found.text == "covered 44 % of 49.4 s (49 gaps)"


def test_whatif_is_per_covered_minute(opened: Opener) -> None:
    """Two pages take turns in one page of memory, in windows of half the time."""
    windows = [
        Window(N_PAGES, frozenset({t % 2}), None, 2 * t * SECOND + 1, (2 * t + 1) * SECOND + 1)
        for t in range(60)
    ]
    record = opened(windows)
    outcome = run_case(Case(record.path, "classic", 1))
    assert outcome.minutes == pytest.approx(1.0)
    assert outcome.refaults_per_min == pytest.approx(outcome.refaults)
    assert outcome.refaults > 0
    assert float(weighted_mean(np.array([1.0, 3.0]), np.zeros(2))) == 2.0
