"""Residency and events of pages in a record: what was appended is what is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from young_model import SECOND

from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.control.schema import Residency
from kvmhost.errors import LayoutError
from kvmhost.reclaim.exchange.copy import export
from kvmhost.reclaim.record.meta import EVENTS, STATES
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.residency import WindowResidency, residency_of_window
from kvmhost.reclaim.record.writer import RecordWriter

pytest.importorskip("zstandard")

START, N_PAGES = 0x401, 5000
#: By name: gfns of each window; None where residency is not known.
Windows = list[dict[str, set[int]] | None]


def make(seed: int, n_windows: int) -> Windows:
    rng = np.random.default_rng(seed)
    windows: Windows = []
    for _ in range(n_windows):
        if rng.random() < 0.1:
            windows.append(None)
            continue
        window = {
            name: set((START + rng.choice(N_PAGES, rng.integers(0, 40), replace=False)).tolist())
            for name in (*STATES, *EVENTS)
        }
        window["resident"] = set(range(START, START + int(rng.integers(1, N_PAGES))))
        windows.append(window)
    return windows


def residency(window: dict[str, set[int]] | None) -> WindowResidency | None:
    if window is None:
        return None
    bits = {
        name: YoungBitmap.from_gfns(START, N_PAGES, sorted(gfns)).words
        for name, gfns in window.items()
    }
    return WindowResidency(bits, {name: 2 * len(window[name]) for name in EVENTS})


def write(path: Path, windows: Windows, stops: set[int] = frozenset()) -> RecordWriter:  # type: ignore[assignment]
    writer = RecordWriter.create(path, N_PAGES, gfn_start=START)
    for number, window in enumerate(windows):
        times = Provenance("guestpt", "npt", (number + 1) * SECOND, (number + 2) * SECOND)
        young = YoungBitmap.from_gfns(START, N_PAGES, [START + number], provenance=times)
        writer.append(young, residency=residency(window))
        if number in stops:
            writer.close()
            writer = RecordWriter.resume(path)
    return writer


def check(record: YoungRecord, windows: Windows) -> None:
    assert len(record) == len(windows)
    assert record.has_residency().tolist() == [window is not None for window in windows]
    for number, window in enumerate(windows):
        found = record.residency(number)
        assert (found is None) == (window is None)
        if number % 7 and number < len(windows) - 3:
            continue
        for name in (*STATES, *EVENTS):
            gfns = set() if window is None else window[name]
            wanted = YoungBitmap.from_gfns(START, N_PAGES, sorted(gfns)).words
            assert np.array_equal(record.layer(name, number), wanted), (name, number)
            counted = len(gfns) * (2 if name in EVENTS else 1)
            assert record.column(f"n_{name}")[number] == counted
            if found is not None:
                assert np.array_equal(found.bits[name], wanted)
    page = START + 7
    for name in ("resident", "refaulted"):
        wanted_history = [window is not None and page in window[name] for window in windows]
        assert record.history(page, name).tolist() == wanted_history


@given(seed=st.integers(0, 2**32 - 1), n_windows=st.integers(1, 75), data=st.data())
@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_is_written_is_read(
    tmp_path: Path, seed: int, n_windows: int, data: st.DataObject
) -> None:
    """While it is written, after it was closed and continued, and as a copy."""
    for name in ("r", "copy"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    windows = make(seed, n_windows)
    stops = data.draw(st.sets(st.integers(0, n_windows - 1), max_size=2))
    with write(tmp_path / "r", windows, stops), YoungRecord.open(tmp_path / "r") as record:
        check(record, windows)
    with YoungRecord.open(tmp_path / "r") as record:
        check(record, windows)
        export(record, tmp_path / "copy")
    with YoungRecord.open(tmp_path / "copy") as record:
        check(record, windows)


def test_events_that_are_missing_are_said(tmp_path: Path) -> None:
    found = next(residency(window) for window in make(3, 9) if window is not None)
    assert found is not None
    with RecordWriter.create(tmp_path / "r", N_PAGES, gfn_start=START) as writer:
        lost = WindowResidency(found.bits, found.counts, is_complete=False)
        writer.append(YoungBitmap.from_gfns(START, N_PAGES, []), residency=lost)
        writer.append(YoungBitmap.from_gfns(START, N_PAGES, []), residency=found)
    with YoungRecord.open(tmp_path / "r") as record:
        complete = [record.residency(window) for window in (0, 1)]
        assert [part is not None and part.is_complete for part in complete] == [False, True]
        with pytest.raises(LayoutError, match="no bits 'swapped'; there are young"):
            record.layer("swapped", 0)


def reply(resident: list[int], evicted: list[int], lost: int = 0, **gfns: list[int]) -> Residency:
    def bits(pages: list[int]) -> bytes:
        return YoungBitmap.from_gfns(0, 256, pages).words.astype("<u8").tobytes()

    return Residency(
        resident=bits(resident),
        evicted=bits(evicted),
        counts={name: 3 * len(gfns.get(name, [])) for name in EVENTS},
        gfns={name: np.array(gfns.get(name, []), dtype="<u8").tobytes() for name in EVENTS},
        next=0,
        lost=lost,
    )


def test_replies_become_one_window() -> None:
    """A range that does not begin at a word; states are those of the last reply."""
    parts = [
        reply([70, 71], [], refaulted=[70, 255], dropped=[3]),
        reply([71, 250], [70, 3], evicted_limit=[70], refaulted=[71]),
    ]
    found = residency_of_window(parts, 67, 140)

    def gfns(name: str) -> list[int]:
        return YoungBitmap(67, 140, found.bits[name]).gfns().tolist()

    assert (gfns("resident"), gfns("evicted")) == ([71], [70])
    assert (gfns("refaulted"), gfns("evicted_limit"), gfns("dropped")) == ([70, 71], [70], [])
    assert found.counts["refaulted"] == 9
    assert found.is_complete
    assert not residency_of_window([reply([], [], lost=1)], 0, 64).is_complete
    # Memory that was added after the reply.
    assert residency_of_window(parts, 0, 1000).count("resident") == 2
