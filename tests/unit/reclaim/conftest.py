"""Makes records of known content."""

from __future__ import annotations

import pytest
from young_model import SECOND, Window, write

from kvmhost.reclaim.record.reader import YoungRecord


@pytest.fixture
def make_record(tmp_path):
    """Return a maker of records from lists of gfns by window."""
    pytest.importorskip("zstandard")
    opened = []

    def run(lists, n_pages=256, gfn_start=0, name="r.young"):
        windows = [
            Window(n_pages, frozenset(gfns), None, (i + 1) * SECOND, (i + 2) * SECOND)
            for i, gfns in enumerate(lists)
        ]
        write(tmp_path / name, gfn_start, windows, n_pages).close()
        opened.append(YoungRecord.open(tmp_path / name))
        return opened[-1]

    yield run
    for record in opened:
        record.close()
