"""Records to other programs' formats and back: exactly the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from young_model import histories, write

from kvmhost.reclaim.exchange import damon, dirty, text
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
        capture_output=True, text=True, timeout=60,
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
