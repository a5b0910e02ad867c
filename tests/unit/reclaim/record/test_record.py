"""Records: what was appended is what is read, whatever happened in between."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from young_model import SECOND, Window, histories, write

from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.errors import LayoutError, NameInUseError
from kvmhost.reclaim.errors import RecordError
from kvmhost.reclaim.record.journal import JOURNAL_FILE
from kvmhost.reclaim.record.meta import LEVELS, METADATA_FILE, UPPER, Memslot, RecordSession
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.writer import Cost, RecordWriter

FEW = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def place(tmp_path):
    """Return a path at which there is nothing, anew at each call."""

    def fresh():
        shutil.rmtree(tmp_path / "p", ignore_errors=True)
        (tmp_path / "p").mkdir()
        return tmp_path / "p" / "r.young"

    return fresh


def check(record, gfn_start, windows):
    """Compare everything that a record tells with the plain windows."""
    assert len(record) == len(windows)
    n_pages = record.n_pages
    for number, (bitmap, window) in enumerate(zip(record.bitmaps(), windows, strict=True)):
        wanted = window.bitmap(gfn_start)
        assert bitmap == wanted
        assert bitmap.provenance == wanted.provenance
        assert (bitmap.coarse is None) == (wanted.coarse is None)
        assert np.array_equal(bitmap.coarse_as_bool(), wanted.coarse_as_bool())
        if number % 7 == 0:
            assert record.bitmap(number) == wanted
    assert record.column("n_young").tolist() == [len(w.gfns) for w in windows]
    for level in LEVELS:
        sums = record.sums(level)
        for window, row in zip(windows, sums, strict=True):
            bins = np.array(sorted(window.gfns), dtype=np.int64) - gfn_start >> level
            assert row.tolist() == np.bincount(bins, minlength=sums.shape[1]).tolist()
    if n_pages:
        gfn = gfn_start + n_pages // 3
        assert record.history(gfn).tolist() == [gfn in w.gfns for w in windows]


def check_histograms(record, windows):
    last: dict[int, int] = {}
    for now, window in enumerate(windows):
        reuse = [now - last[gfn] if gfn in last else 0 for gfn in window.gfns]
        last |= dict.fromkeys(window.gfns, now)
        ages = [now - when + 1 for when in last.values()]
        got_reuse, got_ages = (record.histogram(n, now, now + 1)[0] for n in ("reuse", "ages"))
        assert buckets(reuse) == got_reuse.tolist()
        assert buckets(ages)[1:] == got_ages.tolist()[1:]
        assert got_ages[0] == max(window.n_pages - len(ages), 0)


def buckets(values):
    found = [0] * len(UPPER)
    for value in values:
        found[next(i for i, upper in enumerate(UPPER) if value <= upper)] += 1
    return found


@FEW
@given(histories(), st.data())
def test_what_is_appended_is_read(place, drawn, data):
    gfn_start, windows = drawn
    path = place()
    stops = data.draw(st.sets(st.integers(0, 150), max_size=3))
    with write(path, gfn_start, windows, stops=stops), YoungRecord.open(path) as record:
        check(record, gfn_start, windows)  # while it is being written
    with YoungRecord.open(path) as record:
        check(record, gfn_start, windows)
        check_histograms(record, windows)


@FEW
@given(histories(max_windows=100, max_pages=150), st.data())
def test_putting_windows_together(place, drawn, data):
    gfn_start, windows = drawn
    path = place()
    write(path, gfn_start, windows).close()
    with YoungRecord.open(path) as record:
        first = data.draw(st.integers(0, len(windows)))
        end = data.draw(st.integers(first, len(windows)))
        some = [w.gfns for w in windows[first:end]]
        pages = range(gfn_start, gfn_start + record.n_pages)
        union = record.between(first, end, "or").gfns().tolist()
        assert union == sorted(frozenset().union(*some))
        common = [gfn for gfn in pages if all(gfn in gfns for gfns in some)]
        assert record.between(first, end, "and").gfns().tolist() == common
        counts = [sum(gfn in gfns for gfns in some) for gfn in pages]
        assert record.between(first, end, "count").tolist() == counts
        if windows:
            last = [
                max((i for i, w in enumerate(windows) if gfn in w.gfns), default=-1)
                for gfn in pages
            ]
            assert record.last_young().tolist() == last


def test_region_counts_with_and_without_bins(make_record):
    lists = [range(i % 3, 5000, 3) for i in range(70)]
    record = make_record(lists, n_pages=5000)
    for edges in ([0, 512, 4096, 5000], [0, 1, 100, 4999], [7, 8], [512, 1024]):
        wanted = [
            [sum(a <= g < b for g in gfns) for a, b in itertools.pairwise(edges)] for gfns in lists
        ]
        assert record.region_counts(edges).tolist() == wanted
    for edges in ([0], [5, 5], [0, 5001], [-1, 4]):
        if len(edges) > 1:
            with pytest.raises(LayoutError):
                record.region_counts(edges)


def test_a_terabyte_of_guest_that_touches_little(tmp_path):
    n_pages = 1 << 28
    gfns = [0, 5, n_pages // 2, n_pages - 1]
    words = np.zeros(n_pages // 64, dtype=np.uint64)
    for gfn in gfns:
        words[gfn // 64] |= np.uint64(1 << gfn % 64)
    with RecordWriter.create(tmp_path / "r", n_pages) as writer:
        for number in range(3):
            times = Provenance("guestpt", "npt", number * SECOND, (number + 1) * SECOND)
            writer.append(YoungBitmap(0, n_pages, words, provenance=times))
    assert sum(f.stat().st_size for f in (tmp_path / "r").rglob("*")) < 1 << 20
    with YoungRecord.open(tmp_path / "r") as record:
        assert np.array_equal(record.bitmap(1).words, words)
        assert [record.history(gfn).sum() for gfn in (*gfns, 7)] == [3, 3, 3, 3, 0]
        found = [gfn + int(i) for gfn, _, bits in record.blocks() for i in np.flatnonzero(bits)]
        assert found == gfns


def test_memory_that_changes_in_mid_record(tmp_path):
    path = tmp_path / "r"
    small = [Memslot(0, 0, 100, 0x7F0000000000)]
    large = [*small, Memslot(1, 0x100000, 5000)]
    with RecordWriter.create(path, 100, memslots=small) as writer:
        writer.append(YoungBitmap.from_gfns(0, 100, [3]))
        writer.set_layout(small)
        writer.set_layout(large)
        writer.append(YoungBitmap.from_gfns(0, 0x100000 + 5000, [3, 0x100000 + 4999]))
        writer.set_layout(small)
        writer.append(YoungBitmap.from_gfns(0, 100, [99]))
    with YoungRecord.open(path) as record:
        assert record.n_pages == 0x100000 + 5000
        assert [record.memslots(i) for i in range(3)] == [small, large, small]
        assert [record.bitmap(i).n_pages for i in range(3)] == [100, 0x100000 + 5000, 100]
        assert record.bitmap(1).gfns().tolist() == [3, 0x100000 + 4999]
        assert record.bitmap(2).gfns().tolist() == [99]


def test_sessions_follow_the_evidence(tmp_path):
    told = ["", "0 of 32", "0 of 32", "32 of 32", ""]
    facts = {"host": "x"}
    with RecordWriter.create(
        tmp_path / "r", 64, session=RecordSession(0, "a", "npt", 7, facts=facts)
    ) as writer:
        for evidence in told:
            source = Provenance("a", "npt", evidence=evidence)
            writer.append(YoungBitmap.from_gfns(0, 64, [1], provenance=source))
    with YoungRecord.open(tmp_path / "r") as record:
        assert [record.bitmap(i).provenance.evidence for i in range(5)] == told
        found = [(s.first_window, s.facts) for s in record.metadata.sessions]
        assert found == [
            (0, facts),
            (1, facts | {"evidence": "0 of 32"}),
            (3, facts | {"evidence": "32 of 32"}),
            (4, facts),
        ]
        assert record.between(1, 3, "or").provenance.evidence == "0 of 32"
    # As when a record is continued: a session without evidence, then bitmaps with the same.
    with RecordWriter.resume(tmp_path / "r") as writer:
        writer.set_session(RecordSession(0, "b", "npt", 7, facts=facts))
        writer.append(YoungBitmap.from_gfns(0, 64, [1], provenance=Provenance("a", "npt")))
    with YoungRecord.open(tmp_path / "r") as record:
        assert len(record.metadata.sessions) == 4


def test_sessions_follow_the_tracker(tmp_path):
    with RecordWriter.create(tmp_path / "r", 64, session=RecordSession(0, "a", "npt", 7)) as writer:
        for tracker in ("a", "a", "b", "a"):
            writer.append(YoungBitmap.from_gfns(0, 64, [1], provenance=Provenance(tracker, "npt")))
        writer.set_session(RecordSession(99, "a", "npt", 8, facts={"host": "x"}))
        writer.append(
            YoungBitmap.from_gfns(0, 64, [1], provenance=Provenance("a", "npt")),
            wall_ns=17,
            cost=Cost(5, 6),
        )
    with YoungRecord.open(tmp_path / "r") as record:
        firsts = [(s.first_window, s.tracker, s.interval_ns) for s in record.metadata.sessions]
        assert firsts == [(0, "a", 7), (2, "b", 7), (3, "a", 7), (4, "a", 8)]
        assert record.session(-1).facts == {"host": "x"}
        assert record.column("wall_ns")[-1] == 17
        assert (record.column("harvest_ns")[-1], record.column("rearm_ns")[-1]) == (5, 6)


def test_a_reader_follows_a_writer(tmp_path):
    writer = RecordWriter.create(tmp_path / "r", 100)
    with YoungRecord.open(tmp_path / "r") as record:
        assert record.is_being_written()
        total = 0
        for number in range(200):
            writer.append(YoungBitmap.from_gfns(0, 100, [number % 100]))
            if number % 13 == 0:
                total += record.refresh()
                assert record.bitmap(-1).gfns().tolist() == [number % 100]
        total += record.refresh()
        assert total == len(record) == 200
        writer.close()
        assert not record.is_being_written()
        assert record.refresh() == 0


def test_two_writers_are_one_too_many(tmp_path):
    with RecordWriter.create(tmp_path / "r", 100):
        with pytest.raises(NameInUseError, match="another process is writing"):
            RecordWriter.resume(tmp_path / "r")
        with pytest.raises(LayoutError, match="exists; append to it"):
            RecordWriter.create(tmp_path / "r", 100)
    RecordWriter.resume(tmp_path / "r").close()


KILLED = """
import os, sys
import numpy as np
from kvmhost.reclaim.record.writer import RecordWriter
from kvmhost.bitmap import YoungBitmap
writer = RecordWriter.create(sys.argv[1], 5000)
number = 0
while True:
    writer.append(YoungBitmap.from_gfns(0, 5000, [number % 5000]))
    number += 1
    os.write(1, b".")
"""


def test_killed_at_any_moment(tmp_path):
    for attempt in range(4):
        path = tmp_path / f"r{attempt}"
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE
        )
        wanted = 70 + 61 * attempt
        said = 0
        while said < wanted:
            said += len(os.read(process.stdout.fileno(), 4096))
        process.send_signal(signal.SIGKILL)
        process.wait()
        said += len(process.stdout.read())
        process.stdout.close()
        with YoungRecord.open(path) as record:
            assert len(record) in (said, said + 1)
            n_windows = len(record)
            for number, bitmap in enumerate(record.bitmaps()):
                assert bitmap.gfns().tolist() == [number % 5000]
        with RecordWriter.resume(path) as writer:
            writer.append(YoungBitmap.from_gfns(0, 5000, [4999]))
        with YoungRecord.open(path) as record:
            assert len(record) == n_windows + 1
            assert record.histogram("reuse", n_windows)[0].sum() == 1
            assert [b.gfns()[0] for b in record.bitmaps()][:-1] == list(range(n_windows))
        assert not list(path.rglob(".tmp-*"))


def copy_of(path):
    target = path.with_name("copy")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(path, target)
    return target


def test_killed_between_any_two_files_of_a_commit(tmp_path, monkeypatch):
    """Each file that a commit replaces is a place where the writer can have died."""
    from kvmhost.reclaim.record import chunks
    from kvmhost.reclaim.record import writer as module

    windows = [
        Window(5000, frozenset({i, 4999 - i}), frozenset({i}) if i % 9 == 0 else None, i, i + 1)
        for i in range(150)
    ]
    real, left = chunks.write_file, [0]

    class Died(Exception):
        pass

    def dying(path, raw):
        if left[0] == 0:
            path.with_name(".tmp-" + path.name).write_bytes(raw[: len(raw) // 2])
            raise Died
        left[0] -= 1
        real(path, raw)

    source = tmp_path / "source"
    write(source, 0, windows[:127]).close()
    for at in range(0, 40, 4):
        path = copy_of(source)
        begun = RecordWriter.resume(path)
        left[0] = at
        monkeypatch.setattr(module, "write_file", dying)
        with contextlib.suppress(Died):
            for window in windows[127:]:
                begun.append(window.bitmap(0))
            begun.commit()
        monkeypatch.setattr(module, "write_file", real)
        os.close(begun._lock_fd)
        with YoungRecord.open(path) as record:
            n_windows = len(record)
            assert n_windows >= 127
            check(record, 0, windows[:n_windows])
        # What is appended now is other than what the dead writer had begun to write.
        others = [Window(5000, frozenset({7}), None, 0, 1) for _ in range(70)]
        with RecordWriter.resume(path) as resumed:
            for window in others:
                resumed.append(window.bitmap(0))
        with YoungRecord.open(path) as record:
            check(record, 0, windows[:n_windows] + others)


@pytest.mark.parametrize("n_windows", [255, 256, 1023, 1024, 1025])
def test_killed_where_chunks_of_numbers_end(tmp_path, n_windows):
    windows = [Window(10, frozenset({i % 10}), None, i, i + 1) for i in range(n_windows)]
    source = tmp_path / "source"
    writer = write(source, 0, windows[:-1])
    writer.commit = lambda: None  # dies with a whole block in the tail
    writer.append(windows[-1].bitmap(0))
    path = copy_of(source)
    writer.close()
    more = windows[:70]
    with RecordWriter.resume(path) as resumed:
        for window in more:
            resumed.append(window.bitmap(0))
    with YoungRecord.open(path) as record:
        check(record, 0, windows + more)
        assert record.column("end_ns").tolist() == [w.end_ns for w in windows + more]
        assert (record.histogram("reuse").sum(axis=1) == 1).all()


def test_a_tail_cut_anywhere(tmp_path):
    windows = [Window(500, frozenset(range(i)), None, i, i + 1) for i in range(20)]
    source = tmp_path / "source"
    writer = write(source, 0, windows)
    path = copy_of(source)  # as a kill would leave it
    writer.close()
    whole = (path / JOURNAL_FILE).read_bytes()
    for size in range(20, len(whole), 97):
        (path / JOURNAL_FILE).write_bytes(whole[:size])
        with YoungRecord.open(path) as record:
            check(record, 0, windows[: len(record)])
            n_windows, loss = len(record), record.loss
            assert ("dropped" in loss) == bool(loss)
    assert n_windows == 19
    assert "window 19 is truncated" in loss
    with RecordWriter.resume(path):
        pass
    with YoungRecord.open(path) as record:
        assert (len(record), record.loss) == (19, "")


def test_a_tail_damaged_before_its_end(tmp_path):
    windows = [Window(500, frozenset(range(i)), None, i, i + 1) for i in range(20)]
    source = tmp_path / "source"
    writer = write(source, 0, windows)
    path = copy_of(source)
    writer.close()
    file = path / JOURNAL_FILE
    raw = bytearray(file.read_bytes())
    raw[25] ^= 1  # in the header of the first entry
    file.write_bytes(raw)
    with pytest.raises(RecordError, match=r"tail.log: entry at offset 0x14: is damaged"):
        YoungRecord.open(path)
    raw[25] ^= 1
    raw[80] ^= 1  # in its payload, which is read when it is asked for
    file.write_bytes(raw)
    with (
        YoungRecord.open(path) as record,
        pytest.raises(RecordError, match=r"checksum at offset 0x34: is wrong"),
    ):
        record.bitmap(0)


def test_a_full_disk_costs_the_last_window(tmp_path, monkeypatch):
    writer = write(tmp_path / "r", 0, [Window(500, frozenset({i}), None, i, i) for i in range(5)])
    real = os.write

    def full(fd, raw):
        if len(raw) < 60:
            raise OSError(28, "No space left on device")
        return real(fd, raw[:50])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            writer.append(YoungBitmap.from_gfns(0, 500, [9]))
    with YoungRecord.open(tmp_path / "r") as record:
        assert (len(record), record.loss) == (5, "")
    with pytest.raises(LayoutError, match="cannot append"):
        writer.append(YoungBitmap.from_gfns(0, 500, [9]))
    writer.close()
    with RecordWriter.resume(tmp_path / "r") as resumed:
        resumed.append(YoungBitmap.from_gfns(0, 500, [10]))
    with YoungRecord.open(tmp_path / "r") as record:
        assert [b.gfns().tolist() for b in record.bitmaps()] == [[0], [1], [2], [3], [4], [10]]


def test_what_other_programs_see_is_a_minute_behind_at_most(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    writer = RecordWriter.create(tmp_path / "r", 100)
    for _ in range(3):
        now[0] += 40
        writer.append(YoungBitmap.from_gfns(0, 100, [1]))
    metadata = json.loads((tmp_path / "r" / ".zmetadata").read_text())["metadata"]
    assert metadata["n_young/.zarray"]["shape"] == [2]
    writer.close()


@pytest.mark.parametrize("windows", [0, 1, 64, 65])
def test_sizes_at_the_edges(tmp_path, windows):
    plain = [Window(1, frozenset({0} if i % 2 else ()), None, i, i + 1) for i in range(windows)]
    write(tmp_path / "r", 0, plain, n_pages=1).close()
    with YoungRecord.open(tmp_path / "r") as record:
        check(record, 0, plain)
        assert record.between(0, None, "or").count() == int(windows > 1)
        for bad in (windows, -windows - 1):
            with pytest.raises(LayoutError, match="no window"):
                record.bitmap(bad)
        with pytest.raises(LayoutError, match="out of range"):
            record.history(1)
        with pytest.raises(LayoutError, match="no windows"):
            record.between(0, windows + 1)
        with pytest.raises(LayoutError, match="no operation"):
            record.between(0, 0, "xor")


def test_one_record_in_a_directory_is_meant_by_the_directory(tmp_path):
    for name in ("a", "b"):
        RecordWriter.create(tmp_path / name, 10, name=name).close()
    with pytest.raises(RecordError, match=r"several records, name one of: .*/a, .*/b"):
        YoungRecord.open(tmp_path)
    shutil.rmtree(tmp_path / "b")
    with YoungRecord.open(tmp_path) as record:
        assert record.name == "a"
    with pytest.raises(RecordError, match="no such record"):
        YoungRecord.open(tmp_path / "nothing")


def test_metadata_that_was_changed(make_record):
    record = make_record([[1]])
    path = Path(record.path) / METADATA_FILE
    text = path.read_text()
    for old, new, said in [
        ('"n_windows":1', '"n_windows":2', "changed or damaged"),
        ('"version":2', '"version":9', "version: is 9; this program reads 1 and 2"),
        ('"chunks":[4096,8]', '"chunks":[4096,9]', "young/.zarray"),
        ("{", "[", "metadata: is invalid"),
    ]:
        path.write_text(text.replace(old, new))
        with pytest.raises(RecordError, match=said):
            YoungRecord.open(record.path)
