"""Write records: append windows to the tail, then move them to the arrays in blocks.

The files on disk are consistent at all times:

1. a window is appended to the tail, with a checksum;
2. once a block of 64 windows is complete, or some time has passed, the chunks of the block
   are written, each to a temporary file that is then renamed;
3. the metadata is replaced, which adds those windows to the arrays;
4. after a complete block the tail is replaced by an empty one.

If a writer is killed between any two of these steps, the windows are in the tail; chunks
that it wrote are ignored, since the metadata does not include them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Provenance, Words, YoungBitmap
from kvmhost.closing import Closing
from kvmhost.errors import LayoutError, NameInUseError, StateError
from kvmhost.files import own_directory
from kvmhost.ownership import check_own_file, open_folder
from kvmhost.reclaim.record import meta as recordmeta
from kvmhost.reclaim.record.chunks import (
    TEMPORARY,
    encode_array,
    encode_bits,
    need_zstd,
    write_file,
    zstd,
)
from kvmhost.reclaim.record.files import LOCK_FILE
from kvmhost.reclaim.record.journal import (
    JOURNAL_FILE,
    JournalEntry,
    JournalWriter,
    pack_row,
    unpack_row,
)
from kvmhost.reclaim.record.meta import (
    COLUMNS,
    EVENTS,
    EVIDENCE,
    HISTOGRAMS,
    STATES,
    Memslot,
    MemslotLayout,
    RecordMeta,
    RecordSession,
)
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.residency import WindowResidency
from kvmhost.reclaim.record.summary import RunningAges, last_window_of, level_sums
from kvmhost.reclaim.young.bits import BLOCK_WINDOWS, to_history
from kvmhost.signals import signals_deferred

__all__ = ["Cost", "RecordInUseError", "RecordWriter"]

#: Maximum lag of the arrays, which other programs read, behind the tail.
_COMMIT_S = 60.0
#: The metadata files of the arrays are updated every this many windows, and at the end.
_EVERYWHERE = 1024


@dataclasses.dataclass(frozen=True)
class Cost:
    """The time that one harvest took inside the VM process."""

    harvest_ns: int = 0
    rearm_ns: int = 0


class RecordWriter(Closing):
    """Writes one record. Only one process at a time can write a record.

    Methods raise OSError if the file system fails (a full disk): the record then contains
    all windows before the failed one, and the writer accepts no more.
    """

    def __init__(self, path: Path, meta: RecordMeta, lock_fd: int) -> None:
        self.path, self._meta, self._lock_fd = path, meta, lock_fd
        self._ages = RunningAges(meta.chunk_pages)
        self._base = self._n_windows = 0
        self._tail: list[JournalEntry] = []
        self._columns = {
            name: np.zeros(recordmeta.COLUMN_CHUNK, dtype=np.int64) for name in COLUMNS
        }
        shape = (recordmeta.HISTOGRAM_CHUNK, recordmeta.N_BUCKETS)
        self._histograms = {name: np.zeros(shape, dtype=np.int64) for name in HISTOGRAMS}
        self._written: set[Path] = set()
        self._journal: JournalWriter | None = None
        self._broken = ""
        self._committed_s = time.monotonic()

    @classmethod
    def create(
        cls,
        path: str | Path,
        n_pages: int,
        *,
        gfn_start: int = 0,
        page_bytes: int = 4096,
        name: str = "",
        memslots: Sequence[Memslot] = (),
        session: RecordSession | None = None,
    ) -> RecordWriter:
        """Create a record; it appears at ``path`` atomically.

        :param n_pages: number of harvested pages; may grow later
        :param memslots: empty: one memslot of all pages
        :raises LayoutError: if the path exists, or the range is invalid
        :raises OSError: if it cannot be written
        """
        need_zstd()
        path = Path(path)
        if path.exists() or path.is_symlink():
            raise LayoutError(f"{path} exists; append to it or choose another path")
        if not 0 <= n_pages <= recordmeta.MAX_PAGES or not 0 <= gfn_start < 1 << 52:
            raise LayoutError(f"record: invalid range of {n_pages} pages from gfn {gfn_start:#x}")
        slots = list(memslots) or [Memslot(0, gfn_start, n_pages)]
        meta = RecordMeta(
            version=recordmeta.FORMAT_VERSION,
            gfn_start=gfn_start,
            n_pages=n_pages,
            page_bytes=page_bytes,
            chunk_pages=recordmeta.chunk_pages_for(n_pages),
            n_windows=0,
            created_ns=time.time_ns(),
            name=name,
            sessions=[session or RecordSession(0, "unknown", "none")],
            layouts=[MemslotLayout(0, slots)],
        )
        return cls(path, meta, _make_skeleton(path, meta))._begin()

    @classmethod
    def resume(cls, path: str | Path, *, session: RecordSession | None = None) -> RecordWriter:
        """Continue a record, whether its previous writer was closed or killed.

        :param session: the source of the bits from now on; None: unchanged
        :raises NameInUseError: if another process is writing it
        :raises RecordError: if it is damaged
        :raises LayoutError: if it is another user's, others can write to it, a part of
            it is a link, or it has an older format
        """
        path = Path(path)
        _check_own(path)
        lock_fd = _lock(path)
        try:
            with YoungRecord(path) as record:
                _check_version(record)
                writer = cls(path, record.metadata, lock_fd)
                writer._restore(record)
        except BaseException:
            os.close(lock_fd)
            raise
        if session is not None:
            writer.set_session(session)
        return writer

    @property
    def n_windows(self) -> int:
        """Number of windows that were appended."""
        return self._n_windows

    @property
    def metadata(self) -> RecordMeta:
        """The metadata of the record."""
        return self._meta

    def append(
        self,
        bitmap: YoungBitmap,
        *,
        wall_ns: int = 0,
        cost: Cost = Cost(),
        residency: WindowResidency | None = None,
    ) -> None:
        """Append a window with the times, tracker and format of the bitmap.

        :param residency: of the pages of the bitmap; None: unknown
        :param wall_ns: ``CLOCK_REALTIME`` at its end, 0 if unknown
        :raises LayoutError: if its first gfn differs from that of the record
        """
        self._check_open()
        if self._broken or self._journal is None:
            raise LayoutError(f"{self.path}: cannot append: {self._broken}")
        if bitmap.gfn_start != self._meta.gfn_start:
            raise LayoutError(
                f"{self.path}: {bitmap!r} does not begin at gfn {self._meta.gfn_start:#x}"
            )
        source = bitmap.provenance
        most = min(recordmeta.MAX_PAGES, recordmeta.MAX_CHUNKS * self._meta.chunk_pages)
        if self._n_windows >= recordmeta.MAX_WINDOWS or bitmap.n_pages > most:
            raise LayoutError(f"{self.path}: {bitmap!r} is too large for a record")
        try:
            self._prepare(source, bitmap.n_pages)
            young = _chunks_of(bitmap.words, self._meta.chunk_pages)
            reuse, ages = self._ages.push(young, bitmap.n_pages)
            flags = recordmeta.COARSE_KNOWN if bitmap.coarse is not None else 0
            if residency is not None:
                flags |= recordmeta.RESIDENCY_KNOWN
                flags |= 0 if residency.is_complete else recordmeta.EVENTS_LOST
            columns = {
                "start_ns": source.window_start_ns,
                "end_ns": source.window_end_ns,
                "wall_ns": wall_ns,
                "n_pages": bitmap.n_pages,
                "n_young": int(reuse.sum()),
                "flags": flags,
                "harvest_ns": cost.harvest_ns,
                "rearm_ns": cost.rearm_ns,
                **_counts_of(residency),
            }
            coarse = _chunks_of(bitmap.coarse, self._meta.chunk_pages)
            entry = JournalEntry(
                columns=[int(columns[name]) for name in COLUMNS],
                young=[(chunk, pack_row(words)) for chunk, words in young.items()],
                coarse=[(chunk, pack_row(words)) for chunk, words in coarse.items()],
                histograms=zstd(np.stack([reuse, ages]).astype("<u4").tobytes(), level=1),
                others=_others_of(residency, self._meta.chunk_pages),
            )
            self._journal.append(entry, bitmap.n_pages)
            self._take(entry, np.stack([reuse, ages]))
            overdue = time.monotonic() - self._committed_s > _COMMIT_S
            if len(self._tail) == BLOCK_WINDOWS or overdue:
                self.commit()
        except OSError as error:
            self._broken = str(error)
            raise

    def set_layout(self, memslots: Sequence[Memslot]) -> None:
        """Record the memslots of the following windows."""
        self._check_open()
        layouts = self._meta.layouts
        if list(memslots) != layouts[-1].memslots:
            kept = [part for part in layouts if part.first_window < self._n_windows]
            self._change(layouts=[*kept, MemslotLayout(self._n_windows, list(memslots))])

    def set_session(self, session: RecordSession) -> None:
        """Record the source of the following windows."""
        self._check_open()
        session = msgspec.structs.replace(session, first_window=self._n_windows)
        sessions = [part for part in self._meta.sessions if part.first_window < self._n_windows]
        # What was set since the last window, and came to nothing, is gone.
        if not sessions or session != msgspec.structs.replace(
            sessions[-1], first_window=self._n_windows
        ):
            sessions.append(session)
        if sessions != self._meta.sessions:
            self._change(sessions=sessions)

    def commit(self) -> None:
        """Write the windows of the tail to the arrays, which other programs read."""
        self._check_open()
        if self._tail and self._meta.n_windows < self._n_windows:
            self._written.clear()
            for name in recordmeta.BITS:
                self._write_bits(name)
            self._write_numbers()
            self._meta = msgspec.structs.replace(self._meta, n_windows=self._n_windows)
            # Each replaced file costs a flush of the file system, and there are dozens.
            _write_metadata(self.path, self._meta, everywhere=self._n_windows % _EVERYWHERE == 0)
        self._committed_s = time.monotonic()
        if len(self._tail) == BLOCK_WINDOWS:
            self._base = self._n_windows
            self._tail = []
            self._new_journal()

    def _check_open(self) -> None:
        if self._lock_fd < 0:
            raise StateError(f"the writer of {self.path}")

    def close(self) -> None:
        """Write all windows to the arrays and release the record. Idempotent."""
        if self._lock_fd < 0:
            return
        try:
            if not self._broken:
                self.commit()
                _write_metadata(self.path, self._meta)
        finally:
            if self._journal is not None:
                self._journal.close()
                self._journal = None
            fd, self._lock_fd = self._lock_fd, -1
            os.close(fd)

    # -- opening --------------------------------------------------------------

    def _begin(self) -> RecordWriter:
        self._new_journal()
        return self

    def _restore(self, record: YoungRecord) -> None:
        """Restore the state of a record: ages from its bits, the open block from its windows."""
        for stale in self.path.rglob(TEMPORARY + "*"):
            stale.unlink(missing_ok=True)
        n_windows = len(record)
        # The block that is incomplete in the arrays; the tail contains it up to its end.
        self._base = self._meta.n_windows - self._meta.n_windows % BLOCK_WINDOWS
        last: dict[int, npt.NDArray[np.int64]] = {}
        size = self._meta.chunk_pages
        for gfn, base, words in record.blocks(0, n_windows):
            chunk = (gfn - self._meta.gfn_start) // size
            windows = last.setdefault(chunk, np.full(size, -1, dtype=np.int64))
            found = last_window_of(words)
            np.copyto(windows[: words.size], found + base, where=found >= 0)
        self._ages.restore(n_windows, last)
        self._restore_numbers(record, n_windows)
        entries = [_entry_of(record, window, size) for window in range(self._base, n_windows)]
        self._new_journal(entries)
        self._tail = [entry for entry, _ in entries]
        self._n_windows = n_windows
        # The open block is rewritten completely. Chunks of other blocks were started by a
        # writer that was killed, and their windows are lost.
        self._meta = msgspec.structs.replace(self._meta, n_windows=self._base)
        block = self._base // BLOCK_WINDOWS
        self.commit()
        self._drop_stale(block)

    def _restore_numbers(self, record: YoungRecord, n_windows: int) -> None:
        for name, buffer in self._columns.items():
            first = self._base - self._base % recordmeta.COLUMN_CHUNK
            buffer[: n_windows - first] = record.column(name)[first:]
        for name, rows in self._histograms.items():
            first = self._base - self._base % recordmeta.HISTOGRAM_CHUNK
            rows[: n_windows - first] = record.histogram(name, first, n_windows)

    def _drop_stale(self, block: int) -> None:
        """Remove the chunks of this and later blocks that this writer did not write."""
        for name in (*recordmeta.BITS, *(f"sum{level}" for level in recordmeta.LEVELS)):
            for file in (self.path / name).iterdir():
                first, _, second = file.name.partition(".")
                number = first if name.startswith("sum") else second
                if number.isdigit() and int(number) >= block and file not in self._written:
                    file.unlink(missing_ok=True)

    # -- writing --------------------------------------------------------------

    def _prepare(self, source: Provenance, n_pages: int) -> None:
        last = self._meta.sessions[-1]
        facts = {name: value for name, value in last.facts.items() if name != EVIDENCE}
        if source.evidence:
            facts[EVIDENCE] = source.evidence
        self.set_session(
            msgspec.structs.replace(
                last, tracker=source.tracker, table_format=source.table_format, facts=facts
            )
        )
        if n_pages > self._meta.n_pages:
            self._change(n_pages=n_pages)

    def _change(self, **fields: object) -> None:
        self._meta = msgspec.structs.replace(self._meta, **fields)
        _write_metadata(self.path, self._meta)

    def _take(self, entry: JournalEntry, histograms: npt.NDArray[np.int64]) -> None:
        for name, value in zip(COLUMNS, entry.columns, strict=True):
            self._columns[name][self._n_windows % recordmeta.COLUMN_CHUNK] = value
        for name, row in zip(HISTOGRAMS, histograms, strict=True):
            self._histograms[name][self._n_windows % recordmeta.HISTOGRAM_CHUNK] = row
        self._tail.append(entry)
        self._n_windows += 1

    def _write_bits(self, name: str) -> None:
        """Write the open block's chunks of a bit array, and its sums."""
        rows_of: dict[int, dict[int, bytes]] = {}
        for at, entry in enumerate(self._tail):
            for chunk, packed in entry.bits(name):
                rows_of.setdefault(chunk, {})[at] = packed
        sums = _Sums(self._meta.n_pages, self._meta.chunk_pages)
        block = self._base // BLOCK_WINDOWS
        for chunk, packed_rows in rows_of.items():
            rows = self._unpack(packed_rows)
            self._put(self.path / name / f"{chunk}.{block}", encode_bits(to_history(rows)))
            if name == "young":
                sums.add(chunk, rows)
        if name == "young":
            for name_of_sum, packed in sums.chunks(block):
                self._put(self.path / name_of_sum, packed)

    def _put(self, path: Path, raw: bytes) -> None:
        write_file(path, raw)
        self._written.add(path)

    def _unpack(self, packed_rows: Mapping[int, bytes]) -> Words:
        size = self._meta.chunk_pages
        rows = np.zeros((BLOCK_WINDOWS, size // 64), dtype=np.uint64)
        for at, packed in packed_rows.items():
            rows[at] = unpack_row(packed, size, self.path / JOURNAL_FILE)
        return rows

    def _write_numbers(self) -> None:
        for name, buffer in self._columns.items():
            chunk = self._base // recordmeta.COLUMN_CHUNK
            self._put_rows(name, f"{chunk}", buffer, self._n_windows, "<i8")
        for name, rows in self._histograms.items():
            chunk = self._base // recordmeta.HISTOGRAM_CHUNK
            self._put_rows(name, f"{chunk}.0", rows, self._n_windows, "<u4")

    def _put_rows(
        self, name: str, key: str, rows: npt.NDArray[np.int64], end: int, dtype: str
    ) -> None:
        """Write a chunk of one array, and begin the next if it is full."""
        write_file(self.path / name / key, encode_array(rows, dtype))
        if end % len(rows) == 0:
            rows[:] = 0

    def _new_journal(self, entries: Sequence[tuple[JournalEntry, int]] = ()) -> None:
        if self._journal is not None:
            self._journal.close()
        self._journal = JournalWriter(self.path / JOURNAL_FILE, self._base, entries)


class _Sums:
    """The levels of one block, collected chunk by chunk."""

    def __init__(self, n_pages: int, chunk_pages: int) -> None:
        self._n_pages, self._chunk_pages = n_pages, chunk_pages
        finest = recordmeta.LEVELS[0]
        bins = -(-n_pages // recordmeta.MAX_CHUNK_PAGES) * (
            recordmeta.MAX_CHUNK_PAGES >> finest
        )  # fmt: skip
        self._finest = np.zeros((BLOCK_WINDOWS, bins), dtype=np.uint16)

    def add(self, chunk: int, rows: Words) -> None:
        """Add the bitmaps of one chunk of pages."""
        finest = recordmeta.LEVELS[0]
        first = chunk * self._chunk_pages >> finest
        sums = level_sums(rows, finest)
        self._finest[:, first : first + sums.shape[1]] = sums

    def chunks(self, block: int) -> Iterator[tuple[str, bytes]]:
        """Yield path and content of each chunk that is not all zeros."""
        sums, below = self._finest.astype(np.uint32), recordmeta.LEVELS[0]
        for level in recordmeta.LEVELS:
            sums = sums.reshape(BLOCK_WINDOWS, -1, 1 << (level - below)).sum(
                axis=2, dtype=np.uint32
            )
            below = level
            bins = recordmeta.n_bins(self._n_pages, level)
            for column in range(-(-bins // recordmeta.LEVEL_CHUNK_BINS)):
                width = recordmeta.LEVEL_CHUNK_BINS
                part = sums[:, column * width : (column + 1) * width]
                if part.any():
                    whole = np.zeros((BLOCK_WINDOWS, width), dtype=np.uint32)
                    whole[:, : part.shape[1]] = part
                    packed = encode_array(whole, recordmeta.level_dtype(level))
                    yield f"sum{level}/{block}.{column}", packed


def _chunks_of(words: Words | None, chunk_pages: int) -> dict[int, Words]:
    """Split a bitmap into chunks of pages; chunks without a set bit are omitted."""
    if words is None:
        return {}
    size = chunk_pages // 64
    padded = np.zeros(-(-words.size // size) * size, dtype=np.uint64)
    padded[: words.size] = words
    chunks = padded.reshape(-1, size)
    return {int(chunk): chunks[chunk] for chunk in np.flatnonzero(chunks.any(axis=1))}


def _entry_of(record: YoungRecord, window: int, chunk_pages: int) -> tuple[JournalEntry, int]:
    """Recreate the entry of a window from a record; return it with its number of pages."""
    bitmap = record.bitmap(window)
    rows = [record.histogram(name, window, window + 1)[0] for name in HISTOGRAMS]
    young = _chunks_of(bitmap.words, chunk_pages)
    coarse = _chunks_of(bitmap.coarse, chunk_pages)
    return JournalEntry(
        columns=[int(record.column(name)[window]) for name in COLUMNS],
        young=[(chunk, pack_row(words)) for chunk, words in young.items()],
        coarse=[(chunk, pack_row(words)) for chunk, words in coarse.items()],
        histograms=zstd(np.stack(rows).astype("<u4").tobytes(), level=1),
        others=_others_of(record.residency(window), chunk_pages),
    ), bitmap.n_pages


def _counts_of(residency: WindowResidency | None) -> dict[str, int]:
    """Return the columns of a window's residency; zeros if it is unknown."""
    if residency is None:
        return {f"n_{name}": 0 for name in (*STATES, *EVENTS)}
    counts = {name: residency.count(name) for name in STATES} | residency.counts
    return {f"n_{name}": counts[name] for name in (*STATES, *EVENTS)}


def _others_of(
    residency: WindowResidency | None, chunk_pages: int
) -> dict[str, list[tuple[int, bytes]]]:
    """Return the chunks of a window's residency, by array; arrays without a bit are omitted."""
    if residency is None:
        return {}
    found = {
        name: [(chunk, pack_row(part)) for chunk, part in _chunks_of(words, chunk_pages).items()]
        for name, words in residency.bits.items()
    }
    return {name: chunks for name, chunks in found.items() if chunks}


def _make_skeleton(path: Path, meta: RecordMeta) -> int:
    """Create an empty record under a temporary name and rename it; return its lock."""
    with contextlib.ExitStack() as undo:
        os.close(open_folder(path.parent))
        with signals_deferred():
            beside = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
            undo.callback(shutil.rmtree, beside, ignore_errors=True)
        for name in recordmeta.array_metadata(meta):
            (beside / name).parent.mkdir(mode=0o700, exist_ok=True)
        bucket = encode_array(recordmeta.UPPER, "<i8")
        write_file(beside / "bucket" / "0", bucket)
        _write_metadata(beside, meta)
        JournalWriter(beside / JOURNAL_FILE, 0).close()
        lock_fd = _lock(beside)
        undo.callback(os.close, lock_fd)
        beside.rename(path)
        undo.pop_all()
    return lock_fd


def _check_version(record: YoungRecord) -> None:
    if record.metadata.version != recordmeta.FORMAT_VERSION:
        raise LayoutError(
            f"{record.path}: records of format {record.metadata.version} can be read but not "
            "continued; convert it first: kvmhost young export --format record"
        )


def _check_own(path: Path) -> None:
    """Refuse a record in which another user could have put, or can put, something.

    What a copy or an archive of a record may hold is looked at too: a link in a file's
    place would have something outside of the record written.
    """
    if path.is_dir():
        own_directory(path)
    for part in path.rglob("*"):
        status = part.lstat()
        if stat.S_ISDIR(status.st_mode):
            own_directory(part)
        else:
            check_own_file(part, status, readable=True)


def _write_metadata(path: Path, meta: RecordMeta, everywhere: bool = True) -> None:
    """Write Zarr's metadata, the authoritative file last.

    :param everywhere: also the files of the arrays, for readers without consolidated metadata
    """
    metadata, text = recordmeta.encode_meta(meta)
    for name, value in metadata.items() if everywhere else ():
        write_file(path / name, msgspec.json.encode(value))
    write_file(path / recordmeta.METADATA_FILE, text)


def _lock(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(path / LOCK_FILE, flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise RecordInUseError(str(path)) from None
    return fd


class RecordInUseError(NameInUseError):
    """Another process is writing that record."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}: another process is writing this record; stop it first"

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return (type(self), (self.path,))
