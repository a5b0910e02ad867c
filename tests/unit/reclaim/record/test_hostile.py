"""Damaged and hostile records: an error that names the file, and bounded memory.

``FUZZ_EXAMPLES=20000`` fuzzes for longer than an ordinary run does.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from waiting import DEADLINE_S
from young_model import Window, write

from kvmhost.bitmap import YoungBitmap
from kvmhost.errors import LayoutError
from kvmhost.reclaim.analyse import analysis, patterns
from kvmhost.reclaim.analyse.pagehistory import history_of
from kvmhost.reclaim.errors import RecordError
from kvmhost.reclaim.exchange import damon, dirty, text
from kvmhost.reclaim.exchange.common import write_record
from kvmhost.reclaim.record import meta as recordmeta
from kvmhost.reclaim.record.chunks import zstd
from kvmhost.reclaim.record.journal import JOURNAL_FILE
from kvmhost.reclaim.record.meta import METADATA_FILE
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.writer import RecordWriter

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A record with sealed windows and a tail, as a killed writer leaves it."""
    path = tmp_path_factory.mktemp("source") / "r"
    windows = [
        Window(3000, frozenset(range(i, 3000, i + 1)), frozenset({i}) if i % 9 == 0 else None, i, i)
        for i in range(80)
    ]
    writer = write(path, 0, windows)
    shutil.copytree(path, path.with_name("killed"))
    writer.close()
    return path.with_name("killed")


def fresh(source, tmp_path):
    shutil.rmtree(tmp_path / "r", ignore_errors=True)
    shutil.copytree(source, tmp_path / "r")
    return tmp_path / "r"


def read_all(path):
    """Do everything that reads."""
    with YoungRecord.open(path) as record:
        list(record.bitmaps())
        for level in recordmeta.LEVELS:
            record.sums(level)
        found = analysis.histograms(record)
        analysis.promotion_curve(found)
        analysis.miss_ratio_curve(found)
        patterns.find_phases(record)
        patterns.hot_ranges(record)
        patterns.common_with_next(record)
        if record.n_pages:
            history_of(record, record.gfn_start)
        return len(record)


def read_or_refuse(path):
    """Read everything, or get an error that names a file of the record; no other one."""
    refusal = None
    try:
        read_all(path)
    except RecordError as error:
        refusal = str(error)
    assert refusal is None or str(path) in refusal


def files_of(path):
    return sorted(f for f in path.rglob("*") if f.is_file() and f.stat().st_size)


@given(st.data())
@FUZZ
def test_bit_flips_and_cuts(source, tmp_path, data):
    path = fresh(source, tmp_path)
    file = data.draw(st.sampled_from(files_of(path)))
    raw = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del raw[at:]
    file.write_bytes(raw)
    read_or_refuse(path)


@given(st.data())
@FUZZ
def test_files_of_noise(source, tmp_path, data):
    path = fresh(source, tmp_path)
    file = data.draw(st.sampled_from(files_of(path)))
    file.write_bytes(data.draw(st.binary(max_size=200)))
    read_or_refuse(path)


def test_metadata_that_is_no_text(source, tmp_path):
    path = fresh(source, tmp_path)
    raw = bytearray((path / METADATA_FILE).read_bytes())
    raw[2] ^= 128
    (path / METADATA_FILE).write_bytes(raw)
    with pytest.raises(RecordError, match="metadata: is invalid"):
        YoungRecord.open(path)


def test_what_is_damaged_in_the_arrays_is_never_shown(source, tmp_path):
    """Every flipped bit of a chunk of bits or numbers is found when it is read."""
    rng = random.Random(5)
    for name in ("young/0.0", "coarse/0.0", "end_ns/0", "ages/0.0", "sum9/0.0"):
        for _ in range(4):
            path = fresh(source, tmp_path)
            raw = bytearray((path / name).read_bytes())
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            (path / name).write_bytes(raw)
            with pytest.raises(RecordError, match=name.replace(".", r"\.")):
                read_all(path)


def test_a_chunk_that_is_gone(source, tmp_path):
    path = fresh(source, tmp_path)
    (path / "young" / "0.0").unlink()
    with YoungRecord.open(path) as record, pytest.raises(RecordError, match="young pages, need"):
        record.bitmap(5)
    path = fresh(source, tmp_path)
    (path / "n_young" / "0").unlink()
    with YoungRecord.open(path) as record, pytest.raises(RecordError, match="is missing"):
        record.bitmap(5)


def bomb(n_bytes):
    return zstd(bytes(n_bytes), 19)


def signed(meta):
    """Metadata with a right checksum, whatever it says."""
    plain = msgspec.to_builtins(meta)
    crc = zlib.crc32(msgspec.json.encode(plain, order="deterministic"))
    attributes = {"kvmhost_young": plain, "kvmhost_young_crc32": crc}
    whole = {".zattrs": attributes, **recordmeta.array_metadata(meta)}
    return msgspec.json.encode({"zarr_consolidated_format": 1, "metadata": whole})


HOSTILE = """
import resource, sys
limit = 1 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.path.insert(0, "tests/helpers")
from kvmhost.reclaim.errors import RecordError
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.analyse import analysis
try:
    with YoungRecord.open(sys.argv[1]) as record:
        record.bitmap(0)
        analysis.histograms(record)
        record.sums(9, 0, 1)
except RecordError as error:
    print("refused:", error)
"""


def under_a_limit(path):
    """Read a record in a process that may not have more than 1 GiB."""
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(path)],
        capture_output=True, text=True, timeout=DEADLINE_S, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sizes_that_lie(source, tmp_path):
    with YoungRecord.open(source) as record:
        meta = record.metadata
    for number, change in enumerate(
        (
            {"n_pages": 1 << 30},
            {"n_windows": 1 << 26},
            {"n_windows": 1 << 40},
            {"n_pages": 1 << 50},
            {"chunk_pages": 1 << 30},
            {"chunk_pages": 4097},
            {"page_bytes": 0},
            {"gfn_start": -1},
        )
    ):
        path = fresh(source, tmp_path)
        (path / METADATA_FILE).write_bytes(signed(msgspec.structs.replace(meta, **change)))
        if number < 2:
            # Sizes that a record could have.
            said = under_a_limit(path)
            assert said.startswith(f"refused: {path}")
        else:
            with pytest.raises(RecordError):
                read_all(path)


def test_bombs(source, tmp_path):
    path = fresh(source, tmp_path)
    (path / "young" / "0.0").write_bytes(bomb(256 << 20))
    assert "the frame gives a content size of 268435456 bytes" in under_a_limit(path)
    (path / "young" / "0.0").write_bytes(bytes(1 << 28))
    assert "larger than 69632 bytes" in under_a_limit(path)
    for name in ("end_ns/0", "ages/0.0", "sum9/0.0"):
        path = fresh(source, tmp_path)
        (path / name).write_bytes(bomb(64 << 20))
        with pytest.raises(RecordError, match="the frame gives a content size of 67108864 bytes"):
            read_all(path)


def test_a_bomb_in_the_tail(source, tmp_path):
    path = fresh(source, tmp_path)
    raw = (path / JOURNAL_FILE).read_bytes()
    entry = msgspec.msgpack.encode([[0] * 8, [[0, bomb(1 << 28)]], [], bomb(8)])
    head = struct.pack("<4sIQQI", b"KHYW", len(entry), 64, 3000, zlib.crc32(entry))
    (path / JOURNAL_FILE).write_bytes(
        raw[:20] + head + zlib.crc32(head).to_bytes(4, "little") + entry
    )
    with YoungRecord.open(path) as record, pytest.raises(RecordError, match=r"tail\.log"):
        record.bitmap(64)


def test_other_things_under_a_record_s_name(tmp_path, source):
    for make in (
        lambda p: p.write_bytes(b"x"),
        lambda p: p.mkdir(),
        lambda p: (p.mkdir(), (p / JOURNAL_FILE).mkdir(), (p / METADATA_FILE).mkdir()),
        lambda p: (p.mkdir(), os.mkfifo(p / METADATA_FILE), (p / JOURNAL_FILE).touch()),
    ):
        path = tmp_path / "other"
        make(path)
        with pytest.raises(RecordError):
            YoungRecord.open(path)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# -- imports ----------------------------------------------------------------------


@given(st.binary(max_size=300))
@FUZZ
def test_noise_to_import(tmp_path, raw):
    file = tmp_path / "noise"
    file.write_bytes(raw)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    for read in (damon.read, text.read):
        try:
            write_record(read(file), tmp_path / "out", "noise")
        except (RecordError, LayoutError):
            assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


NUMBERS = st.sampled_from([0, 1, -1, 1 << 12, 1 << 40, 1 << 63, 1 << 64, 10**25, "7", "x", None])


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=4), NUMBERS, NUMBERS)
@FUZZ
def test_damon_records_that_lie(tmp_path, regions, first, pages):
    file = tmp_path / "lies.json"
    snapshot = {
        "start_time": 1,
        "end_time": first,
        "regions": [{"start": a, "end": b, "nr_accesses": {"samples": c}} for a, b, c in regions],
        "kvmhost_young": {"n_pages": pages},
    }
    extra = {"gfn_start": first, "n_pages": pages, "page_bytes": 4096}
    raw = msgspec.json.encode([{"snapshots": [snapshot], "kvmhost_young": extra}])
    file.write_bytes(raw)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    try:
        write_record(damon.read(file), tmp_path / "out", "lies")
    except (RecordError, LayoutError):
        assert not (tmp_path / "out").exists()


REGION = {"start": 0, "end": 1 << 42, "nr_accesses": {"samples": 1}}
SNAPSHOT = {"start_time": 0, "end_time": 1, "regions": [REGION]}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("damon", msgspec.json.encode([{"snapshots": [SNAPSHOT]}]), "pages in .* bytes: at most"),
        ("ranges", b"0 0x40000000\n", "pages in 13 bytes: at most"),
        ("ranges", b"window\n0 0x1000000\n" * 80, "80 windows of 16777216 pages"),
    ],
)
def test_a_short_file_cannot_ask_for_much_memory(tmp_path, name, content, said):
    file = tmp_path / "short"
    file.write_bytes(content)
    read = {"damon": damon.read, "ranges": text.read}[name]
    tracemalloc.start()
    try:
        with pytest.raises(RecordError, match=said):
            read(file)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_short_record_cannot_ask_for_much_memory(tmp_path):
    n_pages = 1 << 30
    with RecordWriter.create(tmp_path / "r", n_pages) as writer:
        words = np.zeros(n_pages // 64, dtype=np.uint64)
        words[[0, -1]] = 1
        writer.append(YoungBitmap(0, n_pages, words))
    with YoungRecord.open(tmp_path / "r") as record:
        for costly in (lambda: record.between(0, 1, "count"), record.last_young):
            tracemalloc.start()
            try:
                with pytest.raises(RecordError, match="too little for a number a page"):
                    costly()
                assert tracemalloc.get_traced_memory()[1] < 4 << 20
            finally:
                tracemalloc.stop()
        # What takes a bit for each page, or nothing, goes on.
        assert record.between(0, 1).count() == 2
        assert [b.count() for b in record.bitmaps()] == [2]
        assert record.sums(18).sum() == record.sums(9).sum() == 2


def test_pipes_in_the_place_of_files(source, tmp_path):
    for name in (JOURNAL_FILE, METADATA_FILE):
        path = fresh(source, tmp_path)
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(RecordError, match="not a regular file"):
            YoungRecord.open(path)
    path = fresh(source, tmp_path)
    (path / ".lock").unlink(missing_ok=True)
    os.mkfifo(path / ".lock")
    with YoungRecord.open(path) as record:
        assert not record.is_being_written()
    os.mkfifo(tmp_path / "pipe")
    for read in (damon.read, text.read, lambda file: dirty.read_files([file])):
        with pytest.raises(RecordError, match="not a regular file"):
            list(read(tmp_path / "pipe").windows)


def test_heads_over_the_same_bytes_are_not_read_over_and_over(source, tmp_path):
    path = fresh(source, tmp_path)
    tail = path / JOURNAL_FILE
    n_heads = 3000
    heads = []
    for i in range(n_heads):
        head = struct.pack("<4sIQQI", b"KHYW", 32 * (n_heads - i - 1), 5, 4096, 1)
        heads.append(head + zlib.crc32(head).to_bytes(4, "little"))
    tail.write_bytes(tail.read_bytes() + bytes(8) + b"".join(heads))
    with pytest.raises(RecordError, match="heads over the same bytes"):
        YoungRecord.open(path)


def test_zlib_bombs_and_cut_streams(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(zlib.compress(bytes(64 << 20), 9))
    with pytest.raises(RecordError, match="holds above 1048576 bytes"):
        damon.read(file, 1 << 20)
    file.write_bytes(zlib.compress(b"[]" * 1000)[:-3])
    with pytest.raises(RecordError, match="is cut off"):
        damon.read(file)


def test_an_index_does_not_reach_outside(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(8))
    place = tmp_path / "d"
    place.mkdir()
    for name in ("../secret", str(secret), ""):
        index = {"gfn_start": 0, "n_pages": 64, "windows": [{"file": name, "n_pages": 64}]}
        (place / "index.json").write_bytes(msgspec.json.encode(index))
        with pytest.raises(RecordError):
            list(dirty.read(place).windows)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"0x10 0x5\n", "line at offset 0x0: invalid range of gfns '0x10 0x5'"),
        (b"1 2\nhello\n", "line at offset 0x4: invalid range 'hello'"),
        (b"1 2\n\xff\xfe\n", "line at offset 0x4: is no plain text"),
        (b"0 0x100000000\n", "4294967296 pages: a record has at most"),
        (b"window n_pages=4\n1 9\n", "lie outside the window's 4 pages"),
    ],
)
def test_text_that_is_none(tmp_path, content, said):
    file = tmp_path / "t"
    file.write_bytes(content)
    with pytest.raises(RecordError) as caught:
        write_record(text.read(file), tmp_path / "out", "text")
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_dirty_bitmaps_that_do_not_fit(tmp_path):
    file = tmp_path / "b.bin"
    file.write_bytes(np.array([1, 1 << 40], dtype="<u8").tobytes())
    assert [w.bitmap.count() for w in dirty.read_files([file]).windows] == [2]
    for pages in (100, 64, 200):
        with pytest.raises(RecordError, match=r"b\.bin: bitmap at offset"):
            list(dirty.read_files([file], 0, pages).windows)
    found = dirty.read_files([file], 0x400, 105)
    assert next(iter(found.windows)).bitmap == YoungBitmap.from_gfns(
        0x400, 105, [0x400, 0x400 + 104]
    )
