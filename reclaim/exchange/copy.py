"""Copies of records, in the current format of records."""

from __future__ import annotations

import shutil
from pathlib import Path

from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.writer import Cost, RecordWriter

__all__ = ["export"]


def export(record: YoungRecord, path: Path, first: int = 0, end: int | None = None) -> None:
    """Write windows as a new record; nothing is left at ``path`` if that fails.

    :raises OSError: if it cannot be written
    :raises LayoutError: if there is something at ``path``
    """
    end = len(record) if end is None else end
    meta = record.metadata
    writer = RecordWriter.create(
        path,
        record.n_pages,
        gfn_start=record.gfn_start,
        page_bytes=meta.page_bytes,
        name=record.name,
        memslots=record.memslots(first) if first < end else meta.layouts[-1].memslots,
        session=record.session(first) if first < end else meta.sessions[-1],
    )
    try:
        with writer:
            _copy(record, writer, first, end)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _copy(record: YoungRecord, writer: RecordWriter, first: int, end: int) -> None:
    wall, harvest, rearm = (record.column(f"{name}_ns") for name in ("wall", "harvest", "rearm"))
    for window, bitmap in enumerate(record.bitmaps(first, end), first):
        writer.set_session(record.session(window))
        writer.set_layout(record.memslots(window))
        cost = Cost(int(harvest[window]), int(rearm[window]))
        residency = record.residency(window)
        writer.append(bitmap, wall_ns=int(wall[window]), cost=cost, residency=residency)
