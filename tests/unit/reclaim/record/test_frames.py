"""xarray and pandas views have what the record has."""

from __future__ import annotations

import pytest

from kvmhost.errors import CapabilityError
from kvmhost.reclaim.record import frames

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
    recent = data.ages.where(data.bucket <= 10, 0).isel(bucket=slice(1, None)).sum("bucket")
    wanted = [len(set().union(*LISTS[max(t - 9, 0) : t + 1])) for t in range(70)]
    assert recent.values.tolist() == wanted


def test_without_the_library(make_record, monkeypatch):
    record = make_record(LISTS, n_pages=600)
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(CapabilityError, match=r"kvmhost\[record\]"):
        frames.to_frame(record)
