"""The packed bits of a record as booleans of xarray, unpacked when they are read.

Imports xarray.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from xarray import Variable
from xarray.backends import BackendArray
from xarray.core import indexing

__all__ = ["unpacked"]


def unpacked(packed: Any, n_windows: int) -> Any:
    """Return a variable of booleans over ``gfn`` and ``window``.

    :param packed: variable of bytes over ``gfn`` and ``window_byte``; if it is chunked by
        Dask, the result is too
    """
    attributes = {"about": packed.attrs["about"]}
    if packed.chunks is None:
        array: Any = indexing.LazilyIndexedArray(_Unpacked(packed, n_windows))
    else:
        gfns, window_bytes = packed.chunks
        chunks = (gfns, tuple(8 * size for size in window_bytes))
        array = packed.data.map_blocks(_unpack, dtype=bool, chunks=chunks)[:, :n_windows]
    return Variable(("gfn", "window"), array, attributes)


def _unpack(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    return np.unpackbits(packed, axis=-1).view(bool)


class _Unpacked(BackendArray):  # type: ignore[misc, unused-ignore]
    """Booleans of packed bytes that xarray has not read yet."""

    def __init__(self, packed: Any, n_windows: int) -> None:
        self._packed = packed
        self.shape = (packed.shape[0], n_windows)
        self.dtype = np.dtype(bool)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        basic = indexing.IndexingSupport.BASIC
        return indexing.explicit_indexing_adapter(key, self.shape, basic, self._read)

    def _read(self, key: tuple[Any, Any]) -> Any:
        pages, where = key
        if not isinstance(where, slice):
            packed = self._packed[pages, where // 8].values
            return (packed >> (7 - where % 8) & 1).astype(bool)
        windows = range(self.shape[1])[where]
        first = min(windows, default=0) // 8
        end = max(windows, default=-8) // 8 + 1
        bits = _unpack(self._packed[pages, first : max(end, first)].values)
        return bits[..., np.array(windows, dtype=np.int64) - 8 * first]
