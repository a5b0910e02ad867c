"""The metadata of a record, and the Zarr metadata derived from it.

A record is a Zarr group, in Zarr's format 2. All of its metadata is in one file, Zarr's own
``.zmetadata``: replacing that file adds new windows to the arrays. Its root attributes
contain a :class:`RecordMeta`. Shape, chunks and type of every array are derived from that
alone, and a file with different array metadata is refused before any array is read. The
schema is in ``docs/record.md``.
"""

from __future__ import annotations

import itertools
import zlib
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvmhost.decoding import decode_json
from kvmhost.reclaim.errors import RecordError
from kvmhost.reclaim.young.bits import BLOCK_WINDOWS

__all__ = [
    "BITS",
    "BITS_1",
    "COARSE_KNOWN",
    "COLUMNS",
    "COLUMNS_1",
    "COLUMN_CHUNK",
    "EVENTS",
    "EVENTS_LOST",
    "EVICTIONS",
    "EVIDENCE",
    "FORMAT_VERSION",
    "HISTOGRAMS",
    "HISTOGRAM_CHUNK",
    "LEVELS",
    "LEVEL_CHUNK_BINS",
    "MAX_CHUNKS",
    "MAX_PAGES",
    "METADATA_FILE",
    "N_BUCKETS",
    "PACKING",
    "RESIDENCY_KNOWN",
    "STATES",
    "UPPER",
    "Memslot",
    "MemslotLayout",
    "RecordMeta",
    "RecordSession",
    "array_metadata",
    "chunk_pages_for",
    "decode_meta",
    "encode_meta",
    "level_dtype",
    "n_bins",
]

METADATA_FILE = ".zmetadata"
#: Versions of the record format. Chunks of version 1 are also filtered (packbits, shuffle);
#: such records can be read, but not written.
FORMAT_VERSION, FILTERED_VERSION = 2, 1
MAX_PAGES = 1 << 30
MAX_WINDOWS = 1 << 26
#: Chunks along the gfn axis. If memory grows, the size of the chunks stays the same.
MAX_CHUNKS = 1 << 16
MIN_CHUNK_PAGES, MAX_CHUNK_PAGES = 1 << 12, 1 << 18
#: One bit per page and window.
BITS = {
    "young": "page gfn_start + i was young in the window",
    "coarse": "the bit came from a leaf larger than a page",
}
#: Where pages are at the end of a window, and what happened to them in it: one bit each, if a
#: pager was asked (flag 2). The events are those of the pager's log, in its order.
EVENTS = {
    "evicted_daemon": "evicted in the window, by the daemon that holds the lease",
    "evicted_request": "evicted in the window, by another request",
    "evicted_limit": "evicted in the window, by the VM's choice, at its resident limit",
    "evicted_memory": "evicted in the window, by the VM's choice, without memory on the host",
    "refaulted": "brought back in the window by a touch, after it had been evicted",
    "restored": "brought back in the window without a touch: on request, or prefetched",
    "dropped": "declared free by the guest in the window",
}
EVICTIONS = tuple(name for name in EVENTS if name.startswith("evicted"))
STATES = {
    "resident": "in memory at the end of the window",
    "evicted": "in the pager's store, or in swap, at the end of the window",
}
BITS |= STATES | EVENTS
#: How the bits are packed, for readers of the arrays; in the attributes of each such array.
PACKING = {
    "packed_dimension": "window",
    "bit_order": "big",
    "unpack": "window w of page i is bit 7 - w % 8 of byte [i, w // 8], as in numpy.unpackbits"
    "(array, axis=1); bits after the last window are to be ignored",
}
#: One number per window. Times are ``CLOCK_MONOTONIC``, except ``wall_ns``. The descriptions
#: are part of the format: a record with other descriptions is refused.
COLUMNS = {
    "start_ns": "start of the window, CLOCK_MONOTONIC; 0 if it was not known",
    "end_ns": "end of the window, CLOCK_MONOTONIC",
    "wall_ns": "end of the window, CLOCK_REALTIME; 0 if it was not known",
    "n_pages": "pages that were looked at, from gfn_start",
    "n_young": "pages that were young",
    "flags": "1: which bits are coarse is known (array coarse); 2: residency and events are "
    "known; 4: some events are missing",
    "harvest_ns": "what the harvest took inside the VM; 0 if it was not known",
    "rearm_ns": "what re-arming took inside the VM; 0 if it was not known",
    "n_resident": "pages resident at the end of the window",
    "n_evicted": "pages evicted at the end of the window",
    **{f"n_{name}": f"events, pages {about}" for name, about in EVENTS.items()},
}
#: What format 1 had: the first columns and bits, and its description of the flags.
COLUMNS_1 = dict(itertools.islice(COLUMNS.items(), 8)) | {
    "flags": "1: which bits are coarse is known (array coarse)"
}
BITS_1 = dict(itertools.islice(BITS.items(), 2))
COARSE_KNOWN, RESIDENCY_KNOWN, EVENTS_LOST = 1, 2, 4
COLUMN_CHUNK = 1024
#: Counts of pages by number of windows, in the buckets of :data:`UPPER`.
HISTOGRAMS = {
    "reuse": "young pages by windows since they were last young; bucket 0: never before",
    "ages": "pages by windows since last young, this one being 1; bucket 0: never yet",
}
HISTOGRAM_CHUNK = 256
#: Young pages of each window in bins of ``2 ** level`` pages.
LEVELS = (9, 12, 15, 18)
LEVEL_CHUNK_BINS = 4096
_ZSTD = {"id": "zstd", "level": 3, "checksum": True}


def _upper() -> npt.NDArray[np.int64]:
    wide = [(8 + step) << octave for octave in range(3, 21) for step in range(1, 9)]
    return np.array([0, *range(1, 65), *wide], dtype=np.int64)


#: Bucket ``b`` holds counts of ``UPPER[b - 1] < windows <= UPPER[b]``: exact up to 64,
#: within an eighth above.
UPPER = _upper()
N_BUCKETS = int(UPPER.size)

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 52)]
Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]


class Memslot(msgspec.Struct, frozen=True):
    """Guest pages ``[gfn, gfn + n_pages)``, at ``hva`` in the VM process (0: unknown)."""

    slot: Count
    gfn: Count
    n_pages: Count
    hva: Number = 0


class MemslotLayout(msgspec.Struct, frozen=True):
    """The memslots from one window on, until the next layout."""

    first_window: Count
    memslots: list[Memslot]


#: Fact of a session: :attr:`kvmhost.bitmap.Provenance.evidence` of its bitmaps.
EVIDENCE = "evidence"


class RecordSession(msgspec.Struct, frozen=True):
    """The source of the bits, from one window on, until the next session.

    :param boot_id: of the host; monotonic times of two sessions are comparable if it is equal
    :param facts: host and guest: kernel, machine, engine, image, VM, writer of the record;
        :data:`EVIDENCE`
    """

    first_window: Count
    tracker: Text
    table_format: Text
    interval_ns: Count = 0
    boot_id: Text = ""
    facts: dict[Text, Text] = {}


class RecordMeta(msgspec.Struct, frozen=True):
    """The metadata of a record.

    :param n_pages: end of the gfn axis, counted from ``gfn_start``; grows, never shrinks
    :param chunk_pages: pages of a chunk of the bit arrays; a power of two
    :param n_windows: windows in the arrays; later ones may be in the tail
    """

    version: int
    gfn_start: Count
    n_pages: Annotated[int, msgspec.Meta(ge=0, le=MAX_PAGES)]
    page_bytes: Annotated[int, msgspec.Meta(ge=512, le=1 << 30)]
    chunk_pages: Annotated[int, msgspec.Meta(ge=MIN_CHUNK_PAGES, le=MAX_CHUNK_PAGES)]
    n_windows: Annotated[int, msgspec.Meta(ge=0, le=MAX_WINDOWS)]
    created_ns: Number
    name: Text
    sessions: Annotated[list[RecordSession], msgspec.Meta(max_length=1 << 20)]
    layouts: Annotated[list[MemslotLayout], msgspec.Meta(max_length=1 << 20)]

    @property
    def n_chunks(self) -> int:
        """Chunks along the gfn axis."""
        return -(-self.n_pages // self.chunk_pages)

    @property
    def is_filtered(self) -> bool:
        """Whether chunks have the filters of format 1."""
        return self.version == FILTERED_VERSION

    @property
    def bits(self) -> dict[str, str]:
        """The arrays of bits, with their descriptions."""
        return BITS_1 if self.is_filtered else BITS

    @property
    def columns(self) -> dict[str, str]:
        """The arrays of one number per window, with their descriptions."""
        return COLUMNS_1 if self.is_filtered else COLUMNS


def chunk_pages_for(n_pages: int) -> int:
    """Return the number of pages per chunk of a new record."""
    return min(max(1 << max(n_pages - 1, 0).bit_length(), MIN_CHUNK_PAGES), MAX_CHUNK_PAGES)


def n_bins(n_pages: int, level: int) -> int:
    """Return the number of bins of a level."""
    return -(-n_pages // (1 << level))


def level_dtype(level: int) -> str:
    """Return the type of a level's counts."""
    return "<u2" if level < 16 else "<u4"


def array_metadata(meta: RecordMeta) -> dict[str, Any]:
    """Return ``.zarray`` and ``.zattrs`` of every array, by path."""
    found: dict[str, Any] = {".zgroup": {"zarr_format": 2}}

    def add(
        name: str, axes: dict[str, tuple[int, int]], dtype: str, about: str, sparse: bool = False
    ) -> None:
        found[f"{name}/.zarray"] = {
            "zarr_format": 2,
            "shape": [size for size, _ in axes.values()],
            "chunks": [chunk for _, chunk in axes.values()],
            "dtype": dtype,
            # In arrays where many chunks can be all zeros, such chunks have no file.
            "fill_value": (False if dtype == "|b1" else 0) if sparse else None,
            "order": "C",
            "filters": _filters(dtype) if meta.is_filtered else None,
            "compressor": _ZSTD,
            "dimension_separator": ".",
        }
        found[f"{name}/.zattrs"] = {"_ARRAY_DIMENSIONS": list(axes), "about": about}

    n, t = meta.n_pages, meta.n_windows
    gfns = (n, meta.chunk_pages)
    for name, about in meta.bits.items():
        if meta.is_filtered:
            add(name, {"gfn": gfns, "window": (t, BLOCK_WINDOWS)}, "|b1", about, sparse=True)
        else:
            window_bytes = (-(-t // 8), BLOCK_WINDOWS // 8)
            add(name, {"gfn": gfns, "window_byte": window_bytes}, "|u1", about, sparse=True)
            found[f"{name}/.zattrs"] |= PACKING
    for name, about in meta.columns.items():
        add(name, {"window": (t, COLUMN_CHUNK)}, "<i8", about)
    buckets = (N_BUCKETS, N_BUCKETS)
    for name, about in HISTOGRAMS.items():
        add(name, {"window": (t, HISTOGRAM_CHUNK), "bucket": buckets}, "<u4", about)
    add("bucket", {"bucket": buckets}, "<i8", "upper bounds, in windows")
    for level in LEVELS:
        axes = {
            "window": (t, BLOCK_WINDOWS),
            f"bin{level}": (n_bins(n, level), LEVEL_CHUNK_BINS),
        }
        about = f"young pages in bins of {1 << level} pages"
        add(f"sum{level}", axes, level_dtype(level), about, sparse=True)
    return found


def _filters(dtype: str) -> list[dict[str, Any]]:
    """Return the filters of an array of format 1."""
    if dtype == "|b1":
        return [{"id": "packbits"}]
    return [{"id": "shuffle", "elementsize": np.dtype(dtype).itemsize}]


def encode_meta(meta: RecordMeta) -> tuple[dict[str, Any], bytes]:
    """Return the Zarr metadata by path, and the text of ``.zmetadata``."""
    plain = msgspec.to_builtins(meta)
    attributes = {
        "kvmhost_young": plain,
        "kvmhost_young_crc32": _crc32(plain),
    }
    metadata = {".zattrs": attributes, **array_metadata(meta)}
    text = msgspec.json.encode({"zarr_consolidated_format": 1, "metadata": metadata})
    return metadata, text


def decode_meta(raw: bytes, path: Path) -> RecordMeta:
    """Read ``.zmetadata``.

    :raises RecordError: if it is damaged, or does not match this version of the format
    """
    try:
        whole = decode_json(raw, dict[str, Any])
        metadata = whole["metadata"]
        attributes = metadata[".zattrs"]
        plain, crc = attributes["kvmhost_young"], attributes["kvmhost_young_crc32"]
        version = plain["version"]
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        text = f"is invalid: {type(error).__name__}: {error}"
        raise RecordError(str(path), "metadata", text) from None
    if version not in (FORMAT_VERSION, FILTERED_VERSION):
        problem = f"is {version!r}; this program reads {FILTERED_VERSION} and {FORMAT_VERSION}"
        raise RecordError(str(path), "version", problem)
    if crc != _crc32(plain):
        raise RecordError(str(path), "kvmhost_young_crc32", "the metadata was changed or damaged")
    try:
        meta = msgspec.convert(plain, RecordMeta)
    except (msgspec.ValidationError, RecursionError) as error:
        raise RecordError(str(path), "kvmhost_young", str(error)) from None
    _check(meta, path)
    for key, wanted in array_metadata(meta).items():
        if metadata.get(key) != wanted:
            raise RecordError(str(path), key, f"is {str(metadata.get(key))[:200]}, need {wanted}")
    return meta


def _check(meta: RecordMeta, path: Path) -> None:
    if meta.chunk_pages & (meta.chunk_pages - 1):
        raise RecordError(str(path), "chunk_pages", f"{meta.chunk_pages} is not a power of two")
    if meta.n_chunks > MAX_CHUNKS:
        problem = f"{meta.n_pages} pages in chunks of {meta.chunk_pages}: more than {MAX_CHUNKS}"
        raise RecordError(str(path), "n_pages", problem)
    for name, parts in (("sessions", meta.sessions), ("layouts", meta.layouts)):
        firsts = [part.first_window for part in parts]
        if not firsts or firsts[0] != 0 or firsts != sorted(firsts):
            raise RecordError(str(path), name, "do not begin with window 0 or are not in order")


def _crc32(plain: Any) -> int:
    return zlib.crc32(msgspec.json.encode(plain, order="deterministic"))
