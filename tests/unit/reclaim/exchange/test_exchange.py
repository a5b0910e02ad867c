"""Records to other programs' formats and back: exactly the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from waiting import DEADLINE_S
from young_model import histories, write

from kvmhost.bitmap import pack
from kvmhost.errors import LayoutError
from kvmhost.reclaim.errors import RecordError
from kvmhost.reclaim.exchange import common, damon, dirty, registry, text
from kvmhost.reclaim.exchange.common import write_record
from kvmhost.reclaim.record.meta import COLUMNS
from kvmhost.reclaim.record.reader import YoungRecord


def roundtrips(record, place):
    """Export in each format, and yield what each is read as."""
    for name, compress in (("damon", True), ("damon.json", False)):
        with (place / name).open("wb") as file:
            damon.export(record, file, compress=compress)
        yield name, damon.read(place / name)
    dirty.export(record, place / "dirty")
    yield "dirty", dirty.read(place / "dirty")
    with (place / "ranges").open("wb") as file:
        text.export_ranges(record, file)
    yield "ranges", text.read(place / "ranges")


@given(histories(max_windows=70, max_pages=120))
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_there_and_back(tmp_path, drawn):
    gfn_start, windows = drawn
    place = tmp_path / "p"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    write(place / "r", gfn_start, windows).close()
    with YoungRecord.open(place / "r") as record:
        for name, found in roundtrips(record, place):
            write_record(found, place / f"{name}.back", name)
            with YoungRecord.open(place / f"{name}.back") as back:
                assert (back.gfn_start, back.n_pages) == (record.gfn_start, record.n_pages)
                assert len(back) == len(record)
                for column in COLUMNS:
                    assert back.column(column).tolist() == record.column(column).tolist(), column
                for a, b in zip(record.bitmaps(), back.bitmaps(), strict=True):
                    assert a == b
                    assert a.provenance == b.provenance
                    assert (a.coarse is None) == (b.coarse is None)
                    assert np.array_equal(a.coarse_as_bool(), b.coarse_as_bool())
                assert back.metadata.sessions[0].facts == {"imported_from": name}


def test_damon_s_ages_and_regions(make_record, tmp_path):
    record = make_record([[0, 1, 2], [0, 1, 2, 5], [5]], n_pages=8)
    with (tmp_path / "d").open("wb") as file:
        damon.export(record, file)
    found = json.loads((tmp_path / "d").read_text())[0]["snapshots"][2]["regions"]
    plain = [
        (int(r["start"]) // 4096, int(r["end"]) // 4096, r["nr_accesses"]["samples"],
         int(r["age"]["aggr_intervals"]))
        for r in found
    ]  # fmt: skip
    # 0-2 have just become idle; 3, 4, 6, 7 always were; 5 was young the window before.
    assert plain == [(0, 3, 0, 0), (3, 5, 0, 3), (5, 6, 1, 1), (6, 8, 0, 3)]


def test_a_record_that_damo_wrote(tmp_path):
    """As damo writes it: text with units left out, no keys of ours, unaligned regions."""
    region = {"nr_accesses": {"samples": 3, "percent": None}, "age": {"usec": None}}
    idle = {"nr_accesses": {"samples": None, "percent": "0 %"}, "age": {"usec": None}}
    whole = [
        {
            "kdamond_idx": 0,
            "intervals": {"sample_us": "5,000", "aggr_us": "100,000", "ops_update_us": "1"},
            "target_id": 0,
            "snapshots": [
                {
                    "start_time": "1,000",
                    "end_time": "2,000",
                    "regions": [
                        {"start": "4,294,967,296", "end": "4,294,976,000", **region},
                        {"start": "4294976000", "end": "4295000064", **idle},
                    ],
                }
            ],
        }
    ]
    file = tmp_path / "damon.data"
    file.write_bytes(zlib.compress(json.dumps(whole).encode()))
    found = damon.read(file)
    window = next(iter(found.windows))
    assert (found.gfn_start, found.n_pages, found.interval_ns) == (1 << 20, 8, 100_000_000)
    assert window.bitmap.gfns().tolist() == [(1 << 20) + page for page in range(3)]
    assert window.bitmap.provenance.window_end_ns == 2000


def test_damo_reads_it(make_record, tmp_path):
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    damo = shutil.which("damo", path=beside)
    if damo is None or shutil.which("file") is None:
        pytest.skip("no damo or no file command; pip install damo")
    record = make_record([range(16, 20), [16, 17, 18, 19, 22]] * 4, n_pages=8, gfn_start=16)
    with (tmp_path / "damon.data").open("wb") as file:
        damon.export(record, file, compress=True)
    done = subprocess.run(
        [damo, "report", "access", "--input", str(tmp_path / "damon.data")],
        capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "addr 64.000 KiB" in done.stdout.replace("  ", " ")
    assert "total size: 32.000 KiB" in done.stdout


def test_working_set_for_prefetch(make_record, tmp_path):
    base = 64 * 4
    record = make_record([[base + p for p in row] for row in ([5, 9], [9, 3], [9, 3], [200])],
                  n_pages=256, gfn_start=base, name="w")  # fmt: skip
    assert (text.working_set_gfns(record) - base).tolist() == [9, 3, 5, 200]
    assert (text.working_set_gfns(record, 0, 3, 0.5) - base).tolist() == [9, 3]
    with (tmp_path / "g").open("wb") as file:
        text.export_gfns(text.working_set_gfns(record), file)
    assert (tmp_path / "g").read_text().split() == [hex(base + p) for p in (9, 3, 5, 200)]
    found = text.read(tmp_path / "g")
    assert next(iter(found.windows)).bitmap.gfns().tolist() == [base + p for p in (3, 5, 9, 200)]
    with (tmp_path / "b").open("wb") as file:
        text.export_gfns(text.working_set_gfns(record), file, binary=True)
    assert np.frombuffer((tmp_path / "b").read_bytes(), "<u8").tolist()[0] == base + 9


MIB = 1 << 20


def damon_file(path, *targets):
    """Write a file as damo does: per target its id and, per snapshot, (start, end, samples)."""
    records = [
        {
            "kdamond_idx": 0,
            "context_idx": 0,
            "intervals": {"sample_us": "5000", "aggr_us": "100000", "ops_update_us": "1000000"},
            "scheme_idx": None,
            "target_id": target_id,
            "scheme_filters": [],
            "snapshots": [
                {
                    "start_time": str(10**12 + i * 10**8),
                    "end_time": str(10**12 + (i + 1) * 10**8),
                    "regions": [
                        {"start": str(a), "end": str(b), "nr_accesses": {"samples": str(n)}}
                        for a, b, n in regions
                    ],
                }
                for i, regions in enumerate(snapshots)
            ],
        }
        for target_id, snapshots in targets
    ]
    path.write_bytes(zlib.compress(json.dumps(records).encode()))
    return path


HEAP, MAPPING, STACK = 0x5555_5555_4000, 0x7FFF_8000_0000, 0x7FFF_FFFD_E000
#: A process's virtual addresses: three regions and two huge gaps.
VIRTUAL = [
    [
        (HEAP, HEAP + 64 * MIB, 3),
        (MAPPING, MAPPING + 128 * MIB, 0),
        (MAPPING + 128 * MIB, MAPPING + 256 * MIB, i),
        (STACK, 0x7FFF_FFFF_F000, 20),
    ]
    for i in range(3)
]


def test_of_damon_regions_with_huge_gaps_the_largest_is_said_and_taken(tmp_path):
    found = damon.read(damon_file(tmp_path / "va.damo", (0, VIRTUAL)))
    assert (found.gfn_start, found.n_pages) == (MAPPING >> 12, 256 * MIB >> 12)
    assert f"{MAPPING >> 12:#x}:{(MAPPING >> 12) + (256 * MIB >> 12):#x}" in found.remark
    assert f"{HEAP >> 12:#x}:" in found.remark
    half = 128 * MIB >> 12
    young = [w.bitmap.gfns().tolist() for w in found.windows]
    later = list(range((MAPPING >> 12) + half, (MAPPING >> 12) + 2 * half))
    assert young == [[], later, later]


def test_a_range_picks_and_clips_regions_of_damon(tmp_path):
    path = damon_file(tmp_path / "va.damo", (0, VIRTUAL))
    first = (HEAP >> 12) + 100
    found = damon.read(path, gfn_range=(first, first + 50))
    assert (found.gfn_start, found.n_pages, found.remark) == (first, 50, "")
    assert all(w.bitmap.count() == 50 for w in found.windows)
    with pytest.raises(LayoutError, match=r"no region in gfns 0x10:0x20; regions: 0x555555554:"):
        damon.read(path, gfn_range=(16, 32))
    with pytest.raises(LayoutError, match="bad range"):
        damon.read(path, gfn_range=(32, 16))


def test_a_target_of_damon_is_chosen_and_never_dropped_silently(tmp_path):
    one, two = [[(0, 16 * MIB, 2)]] * 3, [[(16 * MIB, 48 * MIB, 4)]] * 2
    path = damon_file(tmp_path / "two.damo", (3, one), (8, two))
    with pytest.raises(LayoutError, match=r"2 targets \(3, 8\); choose one with --target-id"):
        damon.read(path)
    found = damon.read(path, target_id=8)
    assert (found.gfn_start, found.n_pages) == (16 * MIB >> 12, 32 * MIB >> 12)
    assert len(list(found.windows)) == 2
    with pytest.raises(LayoutError, match="no target 4; there are: 3, 8"):
        damon.read(path, target_id=4)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"PERFILE2", "perf data"),
        (b"damon_recfmt_ver\2", "old binary record"),
        (b"kdamond.0 1234 [001] ..... 1000.1: damon:damon_aggregated:", "perf script"),
    ],
)
def test_other_files_of_damo_are_named_with_the_way_to_convert(head, kind, tmp_path):
    (tmp_path / "f").write_bytes(head + bytes(100))
    with pytest.raises(RecordError, match=f"{kind}.*damo convert_record_format") as caught:
        damon.read(tmp_path / "f")
    assert caught.value.offset == 0


@pytest.mark.parametrize("name", ["damon", "damon-json", "dirty", "ranges"])
def test_every_format_of_windows_is_written_and_read_by_name(make_record, tmp_path, name):
    record = make_record([[1, 2, 3], [2], []])
    assert registry.export(name, record, tmp_path / "out", 0, 3) is None
    found = registry.read(name.removesuffix("-json"), [tmp_path / "out"])
    assert [w.bitmap.gfns().tolist() for w in found.windows] == [[1, 2, 3], [2], []]


def test_working_sets_are_counted_and_one_file_makes_a_record(make_record, tmp_path):
    record = make_record([[1, 2, 3], [2]])
    assert registry.export("gfns", record, tmp_path / "g", 0, 2, min_share=0.6) == 1
    assert (tmp_path / "g").read_text() == "0x2\n"
    with pytest.raises(LayoutError, match="2 were given"):
        registry.read("ranges", [tmp_path / "g", tmp_path / "g"])
    assert registry.IMPORTS.keys() <= registry.EXPORTS.keys()


@pytest.mark.parametrize("n_pages", [0, 1, 63, 64, 65, 191, 192, 193, 1000])
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.98, 1])
def test_runs_of_a_bitmap_are_found_across_words_and_parts(n_pages, share, monkeypatch):
    monkeypatch.setattr(common, "_PART_WORDS", 3)
    bits = np.random.default_rng(n_pages).random(n_pages) < share
    starts, ends = common.ranges_of(pack(bits), n_pages)
    steps = np.diff(np.concatenate([[0], bits.astype(int), [0]]))
    assert starts.tolist() == np.flatnonzero(steps == 1).tolist()
    assert ends.tolist() == np.flatnonzero(steps == -1).tolist()


def test_runs_of_a_large_empty_bitmap_take_little_memory():
    tracemalloc.start()
    words = np.zeros(1 << 22, dtype=np.uint64)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    assert common.ranges_of(words, 1 << 28)[0].size == 0
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    # 256 MiB would be a byte for each page.
    assert peak < 16 << 20
