"""Makes records of known content."""

from __future__ import annotations

import pytest
from fake_vm import FakeVm
from young_model import SECOND, Window, write

from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.vm import worker as worker_module


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


@pytest.fixture
def vms(monkeypatch):
    found = {}

    def connect(name):
        return found.setdefault(name, FakeVm(name))

    monkeypatch.setattr(worker_module, "Client", connect)
    return found
