"""Records as xarray datasets and pandas frames, if these libraries are installed.

A dataset reads the arrays, which lag at most a minute behind a running recording; a
frame contains every window. Both use the monotonic time axis of the record.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmhost.errors import CapabilityError
from kvmhost.installing import install_hint
from kvmhost.reclaim.record.clock import elapsed_s
from kvmhost.reclaim.record.meta import BITS, COLUMNS
from kvmhost.reclaim.record.reader import YoungRecord

__all__ = ["to_dataset", "to_frame"]


def to_frame(record: YoungRecord) -> Any:
    """Return a pandas frame with one row per window: its columns, and its source.

    The index is the time in seconds at which each window ended.

    :raises CapabilityError: without pandas
    """
    pandas = _need("pandas")
    columns: dict[str, Any] = {name: record.column(name) for name in COLUMNS}
    sources = [record.session(window) for window in range(len(record))]
    columns["tracker"] = [source.tracker for source in sources]
    columns["table_format"] = [source.table_format for source in sources]
    columns["young_share"] = columns["n_young"] / np.maximum(columns["n_pages"], 1)
    return pandas.DataFrame(columns, index=pandas.Index(elapsed_s(record), name="seconds"))


def to_dataset(record: YoungRecord) -> Any:
    """Return an xarray dataset of the arrays, read chunk by chunk on demand.

    The arrays of bits are booleans over ``gfn`` and ``window``, unpacked on demand, so that
    ``young.sel(gfn=0x400)`` is the history of a page. ``window`` has the coordinates
    ``seconds``, from the start of the record, and ``time``, the wall clock in UTC at the
    end of each window (NaT where it was not recorded).

    :raises CapabilityError: without xarray and zarr
    """
    xarray = _need("xarray")
    _need("zarr")
    data = xarray.open_zarr(str(record.path), mask_and_scale=False)
    n_windows = data.sizes["window"]
    if not record.metadata.is_filtered:
        from kvmhost.reclaim.record.packedbits import unpacked

        data = data.assign({name: unpacked(data[name].variable, n_windows) for name in BITS})
    wall_ns = record.column("wall_ns")[:n_windows]
    ends = np.where(wall_ns > 0, wall_ns, np.iinfo(np.int64).min).view("datetime64[ns]")
    # A range takes no memory; a gfn per page would be larger than the bits.
    gfns = _need("pandas").RangeIndex(record.gfn_start, record.gfn_start + data.sizes["gfn"])
    data = data.assign_coords(
        gfn=gfns, seconds=("window", elapsed_s(record)[:n_windows]), time=("window", ends)
    )
    return data.assign_attrs(gfn_start=record.gfn_start, page_bytes=record.metadata.page_bytes)


def _need(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise CapabilityError("record", name, str(error), install_hint("record")) from error
