"""xarray and pandas views have what the record has."""

from __future__ import annotations

import numpy as np
import pytest
from young_model import SECOND

from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.errors import CapabilityError
from kvmhost.reclaim.record import frames
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.writer import RecordWriter

LISTS = [range(i, 600, i + 1) for i in range(70)]


def test_frame(make_record):
    pytest.importorskip("pandas")
    record = make_record(LISTS, n_pages=600)
    frame = frames.to_frame(record)
    assert frame.n_young.tolist() == [len(gfns) for gfns in LISTS]
    assert frame.index.tolist() == [float(t + 1) for t in range(70)]
    assert set(frame.tracker) == {"guestpt"}
    assert frame.young_share.iloc[0] == 1.0


def test_dataset(make_record):
    pytest.importorskip("xarray")
    pytest.importorskip("zarr")
    record = make_record(LISTS, n_pages=600, gfn_start=0)
    data = frames.to_dataset(record)
    assert data.young.sum("gfn").values.tolist() == [len(gfns) for gfns in LISTS]
    assert data.young.isel(gfn=9).values.tolist() == record.history(9).tolist()
    assert data.seconds.values.tolist() == [float(t + 1) for t in range(70)]
    assert data.attrs["gfn_start"] == 0
    assert np.isnat(data.time.values).all()
    recent = data.ages.where(data.bucket <= 10, 0).isel(bucket=slice(1, None)).sum("bucket")
    wanted = [len(set().union(*LISTS[max(t - 9, 0) : t + 1])) for t in range(70)]
    assert recent.values.tolist() == wanted


def test_dataset_is_addressed_by_gfn_and_time(tmp_path):
    pytest.importorskip("xarray")
    pytest.importorskip("zarr")
    noon = 1_780_000_000 * SECOND
    with RecordWriter.create(tmp_path / "r", 256, gfn_start=0x400) as writer:
        for t in range(70):
            source = Provenance("guestpt", "npt", (t + 1) * SECOND, (t + 2) * SECOND)
            bitmap = YoungBitmap.from_gfns(0x400, 256, [0x400 + t], provenance=source)
            writer.append(bitmap, wall_ns=noon + t * SECOND)
    with YoungRecord.open(tmp_path / "r") as record:
        data = frames.to_dataset(record)
        assert data.gfn.values.tolist() == list(range(0x400, 0x500))
        assert np.flatnonzero(data.young.sel(gfn=0x403).values).tolist() == [3]
        assert data.time.values.tolist() == [noon + t * SECOND for t in range(70)]
        assert np.flatnonzero(data.young.isel(window=5).values).tolist() == [5]


def test_what_a_record_is_shown_as(make_record):
    lists = [[0x400 + gfn for gfn in gfns] for gfns in LISTS]
    record = make_record(lists, n_pages=600, gfn_start=0x400, name="<b>.young")
    assert repr(record).startswith("YoungRecord('/")
    assert "70 windows, gfns [0x400, 0x658), guestpt)" in repr(record)
    shown = record._repr_html_()
    assert "&lt;b&gt;.young" in shown
    assert "<b>" not in shown
    assert f"{len(range(69, 600, 70)):,} to 600 per window" in shown


def test_without_the_library(make_record, monkeypatch):
    record = make_record(LISTS, n_pages=600)
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(CapabilityError, match=r"\[record\]"):
        frames.to_frame(record)
