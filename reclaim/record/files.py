"""The files in a record's directory, read chunk by chunk and verified.

The metadata and the headers of the tail are read when the record is opened, everything
else on demand. Every method raises :class:`~kvmhost.reclaim.errors.RecordError` if the
file it reads is damaged or missing; the error names the file.
"""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, n_words
from kvmhost.closing import Closing
from kvmhost.files import is_locked, open_regular
from kvmhost.reclaim.errors import RecordError
from kvmhost.reclaim.record import meta as recordmeta
from kvmhost.reclaim.record.chunks import decode_array, decode_bits, need_zstd, read_file
from kvmhost.reclaim.record.journal import JOURNAL_FILE, JournalEntry, JournalReader, unpack_row
from kvmhost.reclaim.record.meta import COLUMNS, HISTOGRAMS, RecordMeta
from kvmhost.reclaim.young.bits import BLOCK_WINDOWS, plane, to_history, to_rows, window_mask

__all__ = ["LOCK_FILE", "RecordFiles", "is_record", "names_in"]

LOCK_FILE = ".lock"
_MAX_METADATA = 64 << 20
_CACHED_BLOCKS = 8
#: Maximum overhead of a compressed chunk over its content.
_SLACK = 4096


#: Pages of a record of any size (256 GiB of memory), and for each byte of its files.
_FREE_PAGES, _PAGES_PER_BYTE = 1 << 26, 512


def is_record(path: str | Path) -> bool:
    """Return whether a path contains the files of a record."""
    return (Path(path) / JOURNAL_FILE).exists()


def names_in(path: str | Path) -> list[str]:
    """Return the names of the records in a directory, one per VM recorded together."""
    with contextlib.suppress(OSError):
        return sorted(entry.name for entry in Path(path).iterdir() if is_record(entry))
    return []


class RecordFiles(Closing):
    """The files of one record. For one thread at a time.

    :ivar metadata: the metadata of the record
    :ivar loss: description of data lost at the end because a writer was killed, or empty
    """

    metadata: RecordMeta
    loss: str

    def __init__(self, path: Path) -> None:
        need_zstd()
        self.path = path
        self._journal: JournalReader | None = None
        self._blocks: collections.OrderedDict[tuple[str, int, int], Words | None] = (
            collections.OrderedDict()
        )
        self._tail: dict[int, JournalEntry] = {}

    def __len__(self) -> int:
        return max(self.metadata.n_windows, self.journal.end_window)

    def close(self) -> None:
        """Close the tail. Idempotent."""
        if self._journal is not None:
            self._journal.close()
        self._blocks.clear()

    def load(self) -> bool:
        """Read metadata and tail; return False if a writer was replacing them."""
        path = self.path / recordmeta.METADATA_FILE
        raw = read_file(path, _MAX_METADATA)
        if raw is None:
            problem = "no such record; create one with kvmhost young record"
            raise RecordError(str(path), "metadata", problem)
        meta = recordmeta.decode_meta(raw, path)
        journal = JournalReader(self.path / JOURNAL_FILE)
        fits = journal.first_window <= meta.n_windows and journal.most_pages() <= meta.n_pages
        if self._journal is not None:
            self._journal.close()
        self.metadata, self._journal = meta, journal
        self.loss = "" if self.is_being_written() else journal.loss
        self._blocks.clear()
        self._tail.clear()
        self._stored_bytes: int | None = None
        return fits

    def is_being_written(self) -> bool:
        """Return whether a writer has the record open."""
        try:
            fd = open_regular(self.path / LOCK_FILE)
        except OSError:
            return False
        try:
            return is_locked(fd)
        finally:
            os.close(fd)

    @property
    def journal(self) -> JournalReader:
        """The tail."""
        assert self._journal is not None
        return self._journal

    def tail_windows(self) -> range:
        """Windows that are only in the tail."""
        return range(self.metadata.n_windows, len(self))

    def is_dense(self) -> bool:
        """Return whether the pages are in proportion to what the files hold."""
        n_pages = self.metadata.n_pages
        if n_pages <= _FREE_PAGES:
            return True
        if self._stored_bytes is None:
            self._stored_bytes = _stored_bytes(self.path)
        return n_pages <= _PAGES_PER_BYTE * self._stored_bytes

    def check_cost(self) -> None:
        """Refuse what takes a number for each page of a record that holds next to nothing.

        :raises RecordError: if so
        """
        if not self.is_dense():
            problem = (
                f"{self.metadata.n_pages} pages, but all files together hold "
                f"{self._stored_bytes} bytes: too little for a number a page"
            )
            raise RecordError(str(self.path), "n_pages", problem)

    def tail_chunks(self, name: str, window: int) -> Iterator[tuple[int, Words]]:
        """Yield the chunks of a window in the tail that have a bit, each once.

        :raises RecordError: if one is damaged, or is not of the record
        """
        path = self.path / JOURNAL_FILE
        for chunk, packed in dict(self.entry(window).bits(name)).items():
            if 0 <= chunk < self.metadata.n_chunks:
                yield chunk, unpack_row(packed, self.metadata.chunk_pages, path)

    def entry(self, window: int) -> JournalEntry:
        """Return the tail's entry of a window."""
        if window not in self._tail:
            self._tail[window] = self.journal.entry(window)
        return self._tail[window]

    def column(self, name: str) -> npt.NDArray[np.int64]:
        """Return one number per window.

        :raises RecordError: if it is negative, or more pages than the record has
        """
        if name not in self.metadata.columns:
            return np.zeros(len(self), dtype=np.int64)
        number = list(COLUMNS).index(name)
        tail = [self.entry(window).columns[number] for window in self.tail_windows()]
        sealed = self.rows(name, 0, self.metadata.n_windows, recordmeta.COLUMN_CHUNK, (), "<i8")
        values = np.concatenate([sealed, np.array(tail, dtype=np.int64)])
        counts = ("n_pages", "n_young", "n_resident", "n_evicted")
        most = self.metadata.n_pages if name in counts else np.iinfo(np.int64).max
        if values.size and not 0 <= values.min() <= values.max() <= most:
            problem = f"has values outside [0, {most}]"
            raise RecordError(str(self.path / name), name, problem)
        return values

    def histogram(self, name: str, first: int, end: int) -> npt.NDArray[np.int64]:
        """Return shape ``(windows, buckets)``."""
        sealed_end = min(end, self.metadata.n_windows)
        shape = (recordmeta.N_BUCKETS,)
        rows = [self.rows(name, first, sealed_end, recordmeta.HISTOGRAM_CHUNK, shape, "<u4")]
        which = list(HISTOGRAMS).index(name)
        for window in range(max(first, self.metadata.n_windows), end):
            rows.append(self.journal.histograms(self.entry(window))[which][None])
        return np.concatenate([part.astype(np.int64) for part in rows])

    def rows(
        self, name: str, first: int, end: int, size: int, shape: tuple[int, ...], dtype: str
    ) -> npt.NDArray[Any]:
        """Read rows of an array that is chunked only along windows."""
        parts = []
        for chunk in range(first // size, -(-end // size)):
            path = self.path / name / ".".join([str(chunk), *["0" for _ in shape]])
            n_bytes = size * int(np.prod(shape)) * np.dtype(dtype).itemsize
            raw = read_file(path, 2 * n_bytes + _SLACK)
            if raw is None:
                raise RecordError(str(path), "chunk", "is missing")
            whole = self._decode(raw, (size, *shape), dtype, path)
            parts.append(whole[max(first - chunk * size, 0) : end - chunk * size])
        return np.concatenate(parts) if parts else np.zeros((0, *shape), dtype=dtype)

    def level_chunk(self, level: int, block: int, column: int) -> npt.NDArray[Any] | None:
        """Return a chunk of a level, None if it is all zeros."""
        path = self.path / f"sum{level}" / f"{block}.{column}"
        shape, dtype = (BLOCK_WINDOWS, recordmeta.LEVEL_CHUNK_BINS), recordmeta.level_dtype(level)
        raw = read_file(path, 2 * shape[0] * shape[1] * 4 + _SLACK)
        return None if raw is None else self._decode(raw, shape, dtype, path)

    def _decode(self, raw: bytes, shape: tuple[int, ...], dtype: str, path: Path) -> Any:
        return decode_array(raw, shape, dtype, path, filtered=self.metadata.is_filtered)

    def history(self, name: str, chunk: int, block: int) -> Words | None:
        """Return one word per page of a chunk, None if it is all zeros."""
        key = (name, chunk, block)
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        found = self._read_history(name, chunk, block)
        self._blocks[key] = found
        if len(self._blocks) > _CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return found

    def row(self, name: str, window: int) -> Words:
        """Return the bitmap of a window over all pages of the record."""
        words = self.metadata.chunk_pages // 64
        row = np.zeros(self.metadata.n_chunks * words, dtype=np.uint64)
        if window >= self.metadata.n_windows:
            for chunk, packed in self.entry(window).bits(name):
                if not 0 <= chunk < self.metadata.n_chunks:
                    path = str(self.path / JOURNAL_FILE)
                    raise RecordError(path, "chunk", f"window {window} has a chunk {chunk}")
                bits = unpack_row(packed, self.metadata.chunk_pages, self.path / JOURNAL_FILE)
                row[chunk * words : (chunk + 1) * words] = bits
        else:
            block, at = divmod(window, BLOCK_WINDOWS)
            for chunk in range(self.metadata.n_chunks):
                history = self.history(name, chunk, block)
                if history is not None:
                    row[chunk * words : (chunk + 1) * words] = plane(history, at)
        return row[: n_words(self.metadata.n_pages)]

    def block_rows(self, name: str, block: int) -> Words:
        """Return shape ``(64, words)``: the bitmaps of all windows of a block."""
        words = self.metadata.chunk_pages // 64
        rows = np.zeros((BLOCK_WINDOWS, self.metadata.n_chunks * words), dtype=np.uint64)
        for chunk in range(self.metadata.n_chunks):
            history = self.history(name, chunk, block)
            if history is not None:
                rows[:, chunk * words : (chunk + 1) * words] = to_rows(history)
        return rows

    def _read_history(self, name: str, chunk: int, block: int) -> Words | None:
        size, base = self.metadata.chunk_pages, block * BLOCK_WINDOWS
        sealed = min(self.metadata.n_windows - base, BLOCK_WINDOWS)
        found: Words | None = None
        if sealed > 0:
            path = self.path / name / f"{chunk}.{block}"
            raw = read_file(path, 2 * 8 * size + _SLACK)
            if raw is not None:
                found = decode_bits(raw, size, path, filtered=self.metadata.is_filtered)
                if sealed < BLOCK_WINDOWS:
                    found &= window_mask(0, sealed)
        rows = self._tail_rows(name, chunk, block)
        if rows is not None:
            tail = to_history(rows)
            found = tail if found is None else found | tail
        return found

    def _tail_rows(self, name: str, chunk: int, block: int) -> Words | None:
        """Return the bitmaps of a block's windows that are only in the tail."""
        base, size = block * BLOCK_WINDOWS, self.metadata.chunk_pages
        windows = range(
            max(base, self.metadata.n_windows), min(base + BLOCK_WINDOWS, len(self))
        )  # fmt: skip
        rows: Words | None = None
        for window in windows:
            packed = dict(self.entry(window).bits(name)).get(chunk)
            if packed is not None:
                if rows is None:
                    rows = np.zeros((BLOCK_WINDOWS, size // 64), dtype=np.uint64)
                path = self.path / JOURNAL_FILE
                rows[window - base] = unpack_row(packed, size, path)
        return rows


def _stored_bytes(path: Path) -> int:
    """Return what a record's files hold; a hole in a file counts as nothing."""
    n_bytes = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                found = (Path(folder) / name).lstat()
                n_bytes += min(found.st_size, found.st_blocks * 512)
    return n_bytes
