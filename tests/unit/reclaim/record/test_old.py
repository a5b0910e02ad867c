"""Records of format 1, as an earlier version of this program wrote them.

``old/format1.tar.xz`` has two: ``closed.young``, and ``killed.young``, whose writer was
killed before the last six windows were in the arrays. Both have the windows of
:func:`_window`.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from young_model import SECOND, Window

from kvmhost.errors import LayoutError
from kvmhost.reclaim.exchange.registry import export
from kvmhost.reclaim.record import frames
from kvmhost.reclaim.record.meta import Memslot
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.writer import RecordWriter

pytest.importorskip("zstandard")

ARCHIVE = Path(__file__).with_name("old") / "format1.tar.xz"
START, N_WINDOWS = 0x400, 70


def _window(number: int) -> Window:
    n_pages = 4000 if number < 30 else 5000
    moving = START + 50 * number
    young = frozenset([*range(START, START + 32), moving, START + n_pages - 1])
    coarse = frozenset([moving]) if number % 9 == 0 else None
    return Window(n_pages, young, coarse, (number + 1) * SECOND, (number + 2) * SECOND)


WINDOWS = [_window(number) for number in range(N_WINDOWS)]


@pytest.fixture(params=["closed", "killed"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / f"{request.param}.young"


def _check(record: YoungRecord) -> None:
    assert len(record) == N_WINDOWS
    assert record.name == "vm1"
    assert record.memslots() == [Memslot(0, START, 4000, 0x7F0000000000)]
    assert record.session(69).facts["kernel"] == "Linux 6.12"
    for number, bitmap in enumerate(record.bitmaps()):
        wanted = WINDOWS[number].bitmap(START)
        assert bitmap == wanted == record.bitmap(number)
        assert bitmap.provenance == wanted.provenance
        assert (bitmap.coarse is None) == (wanted.coarse is None)
        assert np.array_equal(bitmap.coarse_as_bool(), wanted.coarse_as_bool())
    assert record.column("n_young").tolist() == [len(w.gfns) for w in WINDOWS]
    assert record.column("rearm_ns").tolist() == [2000 + w for w in range(N_WINDOWS)]
    assert record.column("wall_ns")[1] - record.column("wall_ns")[0] == SECOND
    assert np.flatnonzero(record.history(START + 100)).tolist() == [2]
    seen = {gfn for window in WINDOWS for gfn in window.gfns}
    assert record.histogram("ages")[-1, 1:].sum() == len(seen)
    assert record.sums(9)[:, 0].tolist() == [
        sum(gfn < START + 512 for gfn in window.gfns) for window in WINDOWS
    ]


def test_it_opens(path: Path) -> None:
    with YoungRecord.open(path) as record:
        assert record.metadata.version == 1
        _check(record)


def test_it_is_a_dataset(path: Path) -> None:
    pytest.importorskip("xarray")
    pytest.importorskip("zarr")
    with YoungRecord.open(path) as record:
        n_sealed = record.metadata.n_windows
        data = frames.to_dataset(record)
    assert data.young.dims == ("gfn", "window")
    assert data.young.sum("gfn").values.tolist() == [len(w.gfns) for w in WINDOWS[:n_sealed]]


def test_it_is_not_continued_but_converted(path: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(LayoutError, match="format 1 can be read but not continued"):
        RecordWriter.resume(path)
    assert before == {p: p.read_bytes() for p in before}
    with YoungRecord.open(path) as record:
        export("record", record, tmp_path / "new", 0, N_WINDOWS)
    with YoungRecord.open(tmp_path / "new") as record:
        assert record.metadata.version == 2
        _check(record)
    with RecordWriter.resume(tmp_path / "new") as writer:
        writer.append(WINDOWS[0].bitmap(START))
    with YoungRecord.open(tmp_path / "new") as record:
        assert record.bitmap(-1) == WINDOWS[0].bitmap(START)
