"""DAMON records, as read by ``damo report``: JSON, or JSON in a zlib stream.

One window is one snapshot, and pages are physical addresses. A region is a run of pages
that were young, or old, for the same number of windows: ``nr_accesses`` is 1 or 0 of 1
sample, and ``age`` is the number of preceding windows with the same value. Data that DAMON
has no field for is stored under a separate key, which damo ignores; with it, exporting
and importing a record preserves it.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.decoding import decode_json
from kvmhost.errors import LayoutError
from kvmhost.reclaim.errors import RecordError
from kvmhost.reclaim.exchange.common import (
    MAX_FILE_BYTES,
    Imported,
    ImportedWindow,
    bitmap_of_ranges,
    check_cost,
    check_pages,
    read_bounded,
)
from kvmhost.reclaim.record.clock import interval_s
from kvmhost.reclaim.record.meta import MAX_PAGES
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.writer import Cost

__all__ = ["export", "read"]

_EXTRA = "kvmhost_young"
#: Numbers in damo's human-readable output have thousands separators.
_NUMBER = re.compile(r"-?[\d,]{1,26}")
_CONVERT = (
    "convert it: damo convert_record_format --record_file FILE --format json_compressed "
    "--output_file OUT"
)
#: Other file formats of damo and perf: first bytes, description, remedy.
_OTHER_FILES = (
    (b"PERFILE2", "perf data of damo record", _CONVERT),
    (b"damon_recfmt_ver", "damo's old binary record", _CONVERT),
    (b"kdamond", "the text of perf script", "import what damo record wrote, or " + _CONVERT),
)


class _Extra(msgspec.Struct, frozen=True):
    gfn_start: int
    n_pages: int
    page_bytes: int
    name: str = ""


class _ExtraWindow(msgspec.Struct, frozen=True):
    n_pages: int
    wall_ns: int = 0
    harvest_ns: int = 0
    rearm_ns: int = 0
    has_coarse: bool = False
    tracker: str = ""
    table_format: str = ""


class _Accesses(msgspec.Struct, frozen=True):
    samples: int | str | None = None
    percent: float | str | None = None


class _Region(msgspec.Struct, frozen=True):
    start: int | str
    end: int | str
    nr_accesses: _Accesses = _Accesses()
    kvmhost_coarse: bool = False


class _Snapshot(msgspec.Struct, frozen=True):
    start_time: int | str | float
    end_time: int | str | float
    regions: list[_Region]
    kvmhost_young: _ExtraWindow | None = None


class _Record(msgspec.Struct, frozen=True):
    snapshots: list[_Snapshot]
    target_id: int | None = None
    intervals: dict[str, Any] | None = None
    kvmhost_young: _Extra | None = None


def export(
    record: YoungRecord,
    out: IO[bytes],
    first: int = 0,
    end: int | None = None,
    *,
    compress: bool = False,
) -> None:
    """Write windows as a DAMON record, one snapshot at a time.

    :param compress: write a zlib stream, which damo calls ``json_compressed``
    """
    packer = zlib.compressobj() if compress else None

    def put(text: bytes) -> None:
        out.write(packer.compress(text) if packer else text)

    interval_us = max(round(interval_s(record) * 1e6), 1)
    head = {
        "kdamond_idx": 0,
        "context_idx": 0,
        "intervals": {
            "sample_us": str(interval_us),
            "aggr_us": str(interval_us),
            "ops_update_us": str(interval_us),
        },
        "scheme_idx": None,
        "target_id": 0,
        "scheme_filters": [],
        _EXTRA: {
            "gfn_start": record.gfn_start,
            "n_pages": record.n_pages,
            "page_bytes": record.metadata.page_bytes,
            "name": record.name,
        },
    }
    put(b"[" + msgspec.json.encode(head)[:-1] + b', "snapshots": [')
    for number, snapshot in enumerate(_snapshots(record, first, end)):
        put((b",\n" if number else b"\n") + msgspec.json.encode(snapshot))
    put(b"\n]}]\n")
    if packer:
        out.write(packer.flush())


def _snapshots(record: YoungRecord, first: int, end: int | None) -> Iterator[dict[str, Any]]:
    before = np.zeros(record.n_pages, dtype=bool)
    age = np.zeros(record.n_pages, dtype=np.int64)
    names = ("wall_ns", "harvest_ns", "rearm_ns")
    for window, bitmap in enumerate(record.bitmaps(first, end), first):
        n, source = bitmap.n_pages, bitmap.provenance
        young, coarse = bitmap.as_bool(), bitmap.coarse_as_bool()
        same = young == before[:n]
        age[:n] = np.where(same, age[:n] + 1, 0)
        before[:n] = young
        kinds = age[:n] * 4 + young * 2 + coarse
        edges = np.flatnonzero(np.diff(kinds, prepend=-1, append=-1))
        yield {
            "start_time": str(source.window_start_ns),
            "end_time": str(source.window_end_ns),
            "regions": [
                _region(record, int(a), int(b), int(kinds[a])) for a, b in itertools.pairwise(edges)
            ],
            "total_bytes": str(n * record.metadata.page_bytes),
            _EXTRA: {
                "n_pages": n,
                "has_coarse": bitmap.coarse is not None,
                "tracker": source.tracker,
                "table_format": source.table_format,
                **{name: int(record.column(name)[window]) for name in names},
            },
        }  # fmt: skip


def _region(record: YoungRecord, first: int, end: int, kind: int) -> dict[str, Any]:
    size = record.metadata.page_bytes
    young = kind >> 1 & 1
    region: dict[str, Any] = {
        "start": str((record.gfn_start + first) * size),
        "end": str((record.gfn_start + end) * size),
        "nr_accesses": {"samples": young, "percent": 100.0 * young},
        "age": {"usec": None, "aggr_intervals": str(kind >> 2)},
        "sz_filter_passed": "0",
    }
    if kind & 1:
        region["kvmhost_coarse"] = True
    return region


def read(
    path: Path,
    most_bytes: int = MAX_FILE_BYTES,
    *,
    target_id: int | None = None,
    gfn_range: tuple[int, int] | None = None,
) -> Imported:
    """Read the snapshots of one target of a DAMON record.

    A page is young in a snapshot if a region that covers it has any accesses. In a file
    written by DAMON, bits are as coarse as its regions.

    :param target_id: the record to read; None: the only one
    :param gfn_range: ``[start, end)`` to read; None: all regions, or, if the gaps between them
        exceed the size of a record, the largest run of adjoining regions, which
        :attr:`Imported.remark` then reports
    :raises RecordError: if it is not a DAMON record, damaged, or larger than ``most_bytes``
    :raises LayoutError: if not exactly one target matches, or no region is in the range
    """
    raw = read_bounded(path, most_bytes)
    whole = _choose(_decode(raw, path), path, target_id)
    extra = whole.kvmhost_young
    page_bytes = extra.page_bytes if extra else 4096
    if page_bytes < 512 or page_bytes & (page_bytes - 1) or page_bytes > 1 << 30:
        raise RecordError(str(path), "page_bytes", f"invalid page size {page_bytes}")
    spans = [
        [_pages(region, page_bytes, path, number) for region in snapshot.regions]
        for number, snapshot in enumerate(whole.snapshots)
    ]
    first, end, remark = _extent(spans, extra, gfn_range, path)
    check_cost(end - first, len(whole.snapshots), len(raw), path)
    interval = (whole.intervals or {}).get("aggr_us", 0)
    return Imported(
        gfn_start=first,
        n_pages=end - first,
        windows=_windows(whole, spans, first, end, path),
        page_bytes=page_bytes,
        name=extra.name if extra else path.stem,
        interval_ns=max(_number(interval, path, "aggr_us"), 0) * 1000,
        remark=remark,
    )


def _decode(raw: bytes, path: Path) -> list[_Record]:
    for magic, kind, remedy in _OTHER_FILES:
        if raw.startswith(magic):
            raise RecordError(str(path), "file type", f"{kind}; {remedy}", 0)
    try:
        return decode_json(raw, list[_Record])
    except msgspec.DecodeError as error:
        raise RecordError(str(path), "DAMON record", str(error)) from None


def _choose(records: list[_Record], path: Path, target_id: int | None) -> _Record:
    if not records:
        raise RecordError(str(path), "DAMON record", "has no target")
    known = [record.target_id for record in records]
    listed = ", ".join(map(str, known[:16])) + (", ..." if len(known) > 16 else "")
    if target_id is None:
        if len(records) > 1:
            raise LayoutError(
                f"{path}: {len(records)} targets ({listed}); choose one with --target-id"
            )
        return records[0]
    matching = [record for record in records if record.target_id == target_id]
    if len(matching) != 1:
        found = "no target" if not matching else f"{len(matching)} records of target"
        raise LayoutError(f"{path}: {found} {target_id}; there are: {listed}")
    return matching[0]


def _extent(
    spans: list[list[tuple[int, int]]],
    extra: _Extra | None,
    gfn_range: tuple[int, int] | None,
    path: Path,
) -> tuple[int, int, str]:
    """Return the gfns ``[first, end)`` to import, and a remark about the choice."""
    runs = _adjoining({span for regions in spans for span in regions if span[0] < span[1]})
    if gfn_range is not None:
        first, end = gfn_range
        if not 0 <= first < end:
            raise LayoutError(f"{path}: bad range {first:#x}:{end:#x}")
        if not any(a < end and first < b for a, b in runs):
            raise LayoutError(f"{path}: no region in gfns {first:#x}:{end:#x}; {_list(runs)}")
        return first, end, ""
    if extra is not None:
        first, end = extra.gfn_start, extra.gfn_start + extra.n_pages
        if first < 0 or (runs and runs[0][0] < first):
            raise RecordError(str(path), "gfn_start", f"a region begins before {first:#x}")
        return first, max(end, runs[-1][1] if runs else end), ""
    if not runs:
        return 0, 0, ""
    first, end = runs[0][0], runs[-1][1]
    if end - first <= MAX_PAGES:
        return first, end, ""
    largest = max(runs, key=lambda run: run[1] - run[0])
    remark = (
        f"regions span {end - first} pages, a record has at most {MAX_PAGES}: the largest one, "
        f"{largest[0]:#x}:{largest[1]:#x}, is imported; --range takes another ({_list(runs)})"
    )
    return *largest, remark


def _adjoining(spans: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the union of ranges as runs without gaps, in ascending order."""
    runs: list[tuple[int, int]] = []
    for a, b in sorted(spans):
        if runs and a <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(b, runs[-1][1]))
        else:
            runs.append((a, b))
    return runs


def _list(runs: list[tuple[int, int]]) -> str:
    shown = ", ".join(f"{a:#x}:{b:#x}" for a, b in runs[:8])
    return f"regions: {shown or 'none'}" + (f" and {len(runs) - 8} more" if len(runs) > 8 else "")


def _windows(
    whole: _Record, spans: list[list[tuple[int, int]]], first: int, end: int, path: Path
) -> Iterator[ImportedWindow]:
    for number, (snapshot, regions) in enumerate(zip(whole.snapshots, spans, strict=True)):
        extra = snapshot.kvmhost_young or _ExtraWindow(end - first, tracker="damon")
        check_pages(extra.n_pages, path)
        n_pages = min(extra.n_pages, end - first)
        where = f"snapshot {number}"
        inside = [
            (max(a - first, 0), min(b, end) - first, region)
            for (a, b), region in zip(regions, snapshot.regions, strict=True)
            if a < end and first < b
        ]
        if any(b > n_pages for _, b, _ in inside):
            raise RecordError(str(path), where, f"a region ends beyond {n_pages} pages")
        young = [(a, b) for a, b, region in inside if _is_young(region, path, where)]
        rough = [(a, b) for a, b, region in inside if region.kvmhost_coarse]
        source = Provenance(
            extra.tracker or "unknown",
            extra.table_format or "none",
            max(_number(snapshot.start_time, path, where), 0),
            max(_number(snapshot.end_time, path, where), 0),
        )
        coarse = bitmap_of_ranges(rough, n_pages) if extra.has_coarse else None
        words = bitmap_of_ranges(young, n_pages)
        yield ImportedWindow(
            YoungBitmap(first, n_pages, words, coarse, source),
            extra.wall_ns,
            Cost(extra.harvest_ns, extra.rearm_ns),
        )


def _pages(region: _Region, page_bytes: int, path: Path, number: int) -> tuple[int, int]:
    where = f"snapshot {number}"
    start, end = _number(region.start, path, where), _number(region.end, path, where)
    if not 0 <= start <= end or end >= 1 << 64:
        raise RecordError(str(path), where, f"a region from {start:#x} to {end:#x}")
    return start // page_bytes, -(-end // page_bytes)


def _is_young(region: _Region, path: Path, where: str) -> bool:
    accesses = region.nr_accesses
    if accesses.samples is not None:
        return _number(accesses.samples, path, where) > 0
    if isinstance(accesses.percent, str):
        return _number(accesses.percent.rstrip(" %").split(".")[0], path, where) > 0
    return bool(accesses.percent)


def _number(value: object, path: Path, where: str) -> int:
    if isinstance(value, int):
        number = value
    elif isinstance(value, float) and abs(value) < 2**63:
        number = int(value)
    elif isinstance(value, str) and _NUMBER.fullmatch(value):
        number = int(value.replace(",", "") or "0")
    else:
        raise RecordError(str(path), where, f"{str(value)[:80]!r} is no number")
    if abs(number) >= 1 << 63:
        # Addresses are at most 2**64, times are smaller; later code accepts both.
        number = min(max(number, -(1 << 64)), 1 << 64)
    return number
