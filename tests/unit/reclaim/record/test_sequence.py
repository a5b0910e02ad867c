"""A YoungRecord is a sequence of bitmaps."""

from __future__ import annotations

from pathlib import Path

import pytest
from young_model import SECOND, Window, write

from kvmhost.reclaim.record.reader import YoungRecord

pytest.importorskip("zstandard")
LISTS = [{i, 100 + i, 200} for i in range(70)]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory):
    path: Path = tmp_path_factory.mktemp("record") / "r.young"
    windows = [
        Window(256, frozenset(gfns), None, (i + 1) * SECOND, (i + 2) * SECOND)
        for i, gfns in enumerate(LISTS)
    ]
    write(path, 0, windows, 256).close()
    with YoungRecord.open(path) as opened:
        yield opened


def test_it_has_the_length_and_the_order_of_its_windows(record) -> None:
    assert len(record) == len(LISTS)
    assert [set(bitmap) for bitmap in record] == LISTS
    assert [set(bitmap) for bitmap in reversed(record)] == LISTS[::-1]


def test_indexes_count_from_both_ends(record) -> None:
    for index in (0, 1, 63, 64, 69, -1, -70):
        assert set(record[index]) == LISTS[index]
        assert record[index].provenance == record.bitmap(index).provenance


@pytest.mark.parametrize("index", [70, -71, 1 << 60])
def test_an_index_that_there_is_not(record, index) -> None:
    with pytest.raises(IndexError, match="there are 70"):
        record[index]


@pytest.mark.parametrize("index", ["1", 1.0, None])
def test_an_index_that_is_none(record, index) -> None:
    with pytest.raises(TypeError):
        record[index]


@pytest.mark.parametrize(
    "where",
    [slice(None), slice(3, 9), slice(60, 68), slice(-3, None), slice(9, 3), slice(500, 600),
     slice(None, None, 7), slice(None, None, -1), slice(20, 5, -3)],
)  # fmt: skip
def test_slices_are_those_of_a_list(record, where) -> None:
    assert [set(bitmap) for bitmap in record[where]] == LISTS[where]
