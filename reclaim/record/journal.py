"""The tail of a record: one entry per window, until a block is written to the arrays.

::

    file   b"KHYJ\\x01\\0\\0\\0"  u64 first window  u32 crc32 of those 16 bytes
    entry  b"KHYW"  u32 payload bytes  u64 window  u64 pages  u32 crc32 of the payload
           u32 crc32 of those 28 bytes  payload

Numbers are little-endian. The payload is msgpack of :class:`JournalEntry`; its bitmaps are
zstd frames of little-endian 64-bit words, one for each chunk of pages that has a bit.

An incomplete entry at the end of the file was truncated when the writer was killed: it is
dropped and reported. An invalid entry followed by a valid one has another cause: the file
is damaged, and reading it fails.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from kvmhost import files
from kvmhost.bitmap import Words
from kvmhost.closing import Closing
from kvmhost.decoding import decode_msgpack
from kvmhost.files import open_log
from kvmhost.reclaim.errors import RecordError
from kvmhost.reclaim.record.chunks import unzstd, write_file, zstd
from kvmhost.reclaim.record.meta import (
    BITS_1,
    COLUMNS,
    COLUMNS_1,
    MAX_PAGES,
    MAX_WINDOWS,
    N_BUCKETS,
)

__all__ = [
    "JOURNAL_FILE",
    "JournalEntry",
    "JournalReader",
    "JournalWriter",
    "pack_row",
    "unpack_row",
]

JOURNAL_FILE = "tail.log"
_FILE = struct.Struct("<8sQI")
_ENTRY = struct.Struct("<4sIQQII")
_FILE_MAGIC, _ENTRY_MAGIC = b"KHYJ\x01\0\0\0", b"KHYW"
#: Maximum size; an entry of the largest record is a few times smaller.
_MAX_PAYLOAD = MAX_PAGES // 4
#: Bytes searched at a time for a valid entry after an invalid one.
_STEP = 1 << 20


class JournalEntry(msgspec.Struct, frozen=True, array_like=True):
    """One window. ``young`` and ``coarse`` list (chunk of pages, its compressed bitmap).

    :param columns: in the order of :data:`~.meta.COLUMNS`; an entry of format 1 has the first eight
    :param others: lists like ``young`` of the other arrays of bits, by name
    :param histograms: zstd of the rows of ``reuse`` and ``ages``, 32 bits per bucket
    """

    columns: list[int]
    young: list[tuple[int, bytes]]
    coarse: list[tuple[int, bytes]]
    histograms: bytes
    others: dict[str, list[tuple[int, bytes]]] = {}

    def bits(self, name: str) -> list[tuple[int, bytes]]:
        """Return the chunks of an array of bits."""
        if name in BITS_1:
            found: list[tuple[int, bytes]] = getattr(self, name)
            return found
        return self.others.get(name, [])


@dataclasses.dataclass(frozen=True)
class _Where:
    offset: int
    n_bytes: int
    n_pages: int
    crc: int


def pack_row(words: Words) -> bytes:
    """Return the compressed bitmap of one chunk of pages."""
    return zstd(words.astype("<u8", copy=False).tobytes(), level=1)


def unpack_row(packed: bytes, chunk_pages: int, path: Path) -> Words:
    """Return the bitmap: the inverse of :func:`pack_row`.

    :raises RecordError: if it is damaged
    """
    raw = unzstd(packed, chunk_pages // 8, path, "bitmap")
    return np.frombuffer(raw, dtype="<u8").astype(np.uint64, copy=False)


class JournalWriter(Closing):
    """Replaces the tail by a new one, and appends entries.

    :param entries: initial entries, with their numbers of pages
    :raises OSError: from every method, if the file cannot be written; complete entries are kept
    """

    def __init__(
        self, path: Path, first_window: int, entries: Iterable[tuple[JournalEntry, int]] = ()
    ) -> None:
        head = _FILE_MAGIC + first_window.to_bytes(8, "little")
        raw = head + zlib.crc32(head).to_bytes(4, "little")
        self._next = first_window
        for entry, n_pages in entries:
            raw += _encode(entry, self._next, n_pages)
            self._next += 1
        write_file(path, raw)
        self._path, self._size = path, len(raw)
        self._fd = open_log(path, keep=True)

    def append(self, entry: JournalEntry, n_pages: int) -> None:
        """Append the next window's entry."""
        raw = _encode(entry, self._next, n_pages)
        done = 0
        try:
            while done < len(raw):
                done += os.write(self._fd, raw[done:] if done else raw)
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._size += len(raw)
        self._next += 1

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _encode(entry: JournalEntry, window: int, n_pages: int) -> bytes:
    payload = msgspec.msgpack.encode(entry)
    head = struct.pack("<4sIQQI", _ENTRY_MAGIC, len(payload), window, n_pages, zlib.crc32(payload))
    return head + zlib.crc32(head).to_bytes(4, "little") + payload


class JournalReader(Closing):
    """Finds the entries of a tail, and reads each on demand.

    :ivar first_window: first window of the tail
    :ivar loss: description of a truncated entry at the end, or empty
    :raises RecordError: if the file is not a tail, or is damaged before its end
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._where: list[_Where] = []
        self.loss = ""
        self.lost_bytes = 0
        try:
            self._file = os.fdopen(files.open_regular(path), "rb")
        except OSError as error:
            problem = error.strerror or str(error)
            raise RecordError(str(path), "file", problem) from error
        try:
            self.first_window = self._read_head()
            self._find()
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._where)

    @property
    def end_window(self) -> int:
        """One more than the last window."""
        return self.first_window + len(self._where)

    def most_pages(self) -> int:
        """Return the largest number of pages of a window."""
        return max((where.n_pages for where in self._where), default=0)

    def entry(self, window: int) -> JournalEntry:
        """Return a window's entry.

        :raises RecordError: if it is damaged
        """
        where = self._where[window - self.first_window]
        payload = self._payload(where)
        if payload is None:
            raise RecordError(str(self._path), "checksum", "is wrong", where.offset)
        try:
            entry = decode_msgpack(payload, JournalEntry)
        except msgspec.DecodeError as error:
            raise RecordError(str(self._path), "entry", str(error), where.offset) from None
        fits = all(0 <= value < 1 << 63 for value in entry.columns)
        missing = len(COLUMNS) - len(entry.columns)
        if missing not in (0, len(COLUMNS) - len(COLUMNS_1)) or not fits:
            raise RecordError(str(self._path), "columns", "do not fit", where.offset)
        entry = msgspec.structs.replace(entry, columns=[*entry.columns, *[0] * missing])
        columns = dict(zip(COLUMNS, entry.columns, strict=True))
        if columns["n_pages"] != where.n_pages or columns["n_young"] > where.n_pages:
            problem = f"give other pages than the {where.n_pages} of its head"
            raise RecordError(str(self._path), "columns", problem, where.offset)
        return entry

    def histograms(self, entry: JournalEntry) -> Words:
        """Return shape ``(2, buckets)``: the rows of reuse and ages of a window."""
        raw = unzstd(entry.histograms, 8 * N_BUCKETS, self._path, "histograms")
        return np.frombuffer(raw, dtype="<u4").reshape(2, N_BUCKETS).astype(np.uint64)

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()

    def _read_head(self) -> int:
        raw = self._file.read(_FILE.size)
        if len(raw) < _FILE.size:
            raise RecordError(str(self._path), "head", "is truncated", len(raw))
        magic, first, crc = _FILE.unpack(raw)
        if magic != _FILE_MAGIC or crc != zlib.crc32(raw[:16]) or first > MAX_WINDOWS:
            raise RecordError(
                str(self._path), "head", "is damaged, or the file is of another kind", 0
            )
        return int(first)

    def _find(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        offset = _FILE.size
        while offset < size:
            where = self._head_at(offset, size, self.end_window)
            if where is None:
                self._cut(offset, size)
                return
            self._where.append(where)
            offset = where.offset + where.n_bytes
        if self._where and self._payload(self._where[-1]) is None:
            self._cut(self._where.pop().offset - _ENTRY.size, size)

    def _head_at(self, offset: int, size: int, window: int | None) -> _Where | None:
        """Return the entry at an offset, None if it is missing or incomplete."""
        raw = os.pread(self._file.fileno(), _ENTRY.size, offset)
        if len(raw) < _ENTRY.size:
            return None
        magic, n_bytes, number, n_pages, crc, head_crc = _ENTRY.unpack(raw)
        if magic != _ENTRY_MAGIC or head_crc != zlib.crc32(raw[:28]):
            return None
        start = offset + _ENTRY.size
        if n_bytes > min(size - start, _MAX_PAYLOAD) or n_pages > MAX_PAGES:
            return None
        if window is not None and number != window:
            return None
        return _Where(start, n_bytes, n_pages, crc)

    def _payload(self, where: _Where) -> bytes | None:
        payload = os.pread(self._file.fileno(), where.n_bytes, where.offset)
        return payload if zlib.crc32(payload) == where.crc else None

    def _cut(self, offset: int, size: int) -> None:
        later = self._good_entry_after(offset + 1, size)
        if later is not None:
            problem = f"is damaged; the next valid one is at offset {later:#x}"
            raise RecordError(str(self._path), "entry", problem, offset)
        self.lost_bytes = size - offset
        self.loss = (
            f"{self._path}: offset {offset:#x}: window {self.end_window} is truncated; "
            f"its {self.lost_bytes} bytes are dropped"
        )

    def _good_entry_after(self, offset: int, size: int) -> int | None:
        # Heads that overlap would have each byte read once for each of them.
        left = 4 * size
        while offset < size:
            raw = os.pread(self._file.fileno(), _STEP, offset)
            at = raw.find(_ENTRY_MAGIC)
            while at >= 0:
                where = self._head_at(offset + at, size, None)
                if where is not None:
                    left -= where.n_bytes
                    if left < 0:
                        problem = "is damaged; what follows has heads over the same bytes"
                        raise RecordError(str(self._path), "entry", problem, offset + at)
                    if self._payload(where) is not None:
                        return offset + at
                at = raw.find(_ENTRY_MAGIC, at + 1)
            if len(raw) < len(_ENTRY_MAGIC):
                return None
            offset += len(raw) - (len(_ENTRY_MAGIC) - 1)
            if len(raw) < _STEP:
                return None
        return None
