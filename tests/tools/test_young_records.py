"""The commands on records, as a person types them."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from json_page import checked
from waiting import DEADLINE_S, until
from young_model import SECOND, Window, write

from kvmhost.control.client import Client
from kvmhost.errors import VmGoneError
from kvmhost.guests.workloads import hotcold_gfns
from kvmhost.memory.layout import IMAGE_GPA
from kvmhost.reclaim.record.meta import METADATA_FILE
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.tools.main import main

pytest.importorskip("zstandard")

#: Where the guest hotcold's pages begin by default.
GFN_START = 1024


@pytest.fixture
def file(tmp_path):
    """80 windows of 4096 pages: a hot set, and one that changes at window 40."""
    windows = []
    for t in range(80):
        cold = range(1000, 1400) if t < 40 else range(3000, 3300)
        gfns = {*range(256, 512), *cold, 2000 + t}
        windows.append(Window(4096, frozenset(gfns), None, (t + 1) * SECOND, (t + 2) * SECOND))
    write(tmp_path / "r.young", 0, windows).close()
    return tmp_path / "r.young"


@pytest.fixture
def young(capsys):
    def run(*words, code=0):
        status = main(["young", *map(str, words)])
        out = capsys.readouterr()
        assert status == code, out.err
        assert "Traceback" not in out.err
        return out.out if code == 0 else out.err

    return run


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def parsed(young, name, *words):
    """Return the one object that a command prints, checked against docs/json.md."""
    (found,) = checked(f"young {name}", young(name, *words, "--json"))
    return found


def test_wss(young, file):
    found = parsed(young, "wss", file, "--over", "1,10s")
    assert [row["young_pages"][0] for row in found["windows"]] == [657] * 40 + [557] * 40
    assert found["windows"][45]["young_pages"][1] == 256 + 400 + 300 + 10
    assert found["lengths"][0] == {"n_windows": 1, "mean_pages": 607.0, "max_pages": 657}
    assert rows_of(young("wss", file, "--over", "1", "--csv"))[79]["wss_1"] == "557"
    part = rows_of(young("wss", file, "--csv", "--over", "1", "--range", "256:512"))
    assert {row["wss_1"] for row in part} == {"256"}
    text = young("wss", file)
    assert "20 of 80 rows" in text
    assert "over     1 windows: mean 2.4 MiB, max 2.6 MiB" in text


def test_ages(young, file):
    found = parsed(young, "ages", file)
    assert found["n_pages"] == 4096
    assert found["never_young_pages"] == 4096 - 256 - 400 - 300 - 80
    by_windows = {row["n_windows"]: row for row in found["ages"]}
    assert by_windows[1]["n_pages"] == 557
    assert by_windows[41]["n_pages"] == 401
    assert by_windows[41]["colder_pages"] == found["never_young_pages"] + 39
    assert found["saving"]["cold_after_windows"] == 1
    assert found["target_share_per_minute"] == pytest.approx(0.002)
    assert "never young" in young("ages", file)


def test_hot(young, file):
    rows = rows_of(young("hot", file, "--min-share", "90%", "--csv"))
    assert [(r["gfn_start"], r["gfn_end"], r["young_share"]) for r in rows] == [
        ("256", "512", "1.0")
    ]
    rows = rows_of(young("hot", file, "--min-share", "1/2", "--csv"))
    assert [(r["gfn_start"], r["young_share"]) for r in rows] == [
        ("1000", "0.5"), ("3000", "0.5"), ("256", "1.0"),
    ]  # fmt: skip
    found = parsed(young, "hot", file, "--top", "1")
    assert [one["gfn_start"] for one in found["ranges"]] == [1000, 3000, 256]
    assert (found["n_windows"], found["hot_pages"]) == (80, 956)
    text = young("hot", file, "--windows=-10:", "--top", "1")
    assert "0xbb8" in text
    assert "more; --top N shows more" in text


def test_diff(young, file):
    found = parsed(young, "diff", file, "--windows", "0:40", "--windows", "40:80")
    assert (found["first_pages"], found["second_pages"], found["both_pages"]) == (696, 596, 256)
    assert found["jaccard_ratio"] == round(256 / (696 + 596 - 256), 6)
    assert {"side": "second", "gfn_start": 3000, "n_pages": 300} in found["ranges"]
    assert "jaccard ratio            1.000" in young("diff", file, file)


def test_stat(young, file):
    found = parsed(young, "stat", file, "--full")
    assert [(p["first_window"], p["n_windows"]) for p in found["phases"]] == [(0, 40), (40, 40)]
    assert (found["n_windows"], found["n_pages"], found["max_young_pages"]) == (80, 4096, 657)
    assert (found["loss"], found["clock_jumps"]) == ("", [])
    wanted = (39 * 656 / 658 + 256 / 958 + 39 * 556 / 558) / 79
    assert found["next_window_jaccard_ratio"] == pytest.approx(wanted, abs=1e-4)
    assert parsed(young, "stat", file)["next_window_jaccard_ratio"] is None
    assert "from window 0: slot 0 [0x0, 0x1000)" in young("stat", file)


def test_page_and_gfn(young, file):
    found = parsed(young, "page", file, "0x7d5")
    assert (found["gfn"], found["now"]) == (0x7D5, None)
    history = found["history"]
    assert (history["young_windows"], history["first_young_window"]) == (1, 5)
    assert (history["age_windows"], history["longest_idle_windows"]) == (75, None)
    assert [row["young"] for row in history["stretches"]] == [False, True, False]
    place = parsed(young, "gfn", "0x7d5123", file)
    assert (place["gfn"], place["slot_offset_bytes"], place["hva"]) == (0x7D5, 0x7D5123, None)
    assert "0x7d5" in young("gfn", "0x7d5", file, "--kind", "gfn")


def test_export_and_import(young, file, tmp_path):
    for name in ("damon", "damon-json", "dirty", "ranges"):
        assert "80 windows" in young("export", file, "--format", name, "-o", tmp_path / name)
        reader = name.removesuffix("-json")
        young("import", tmp_path / name, "--format", reader, "-o", tmp_path / f"{name}.young")
        with YoungRecord.open(file) as a, YoungRecord.open(tmp_path / f"{name}.young") as b:
            assert all(x == y for x, y in zip(a.bitmaps(), b.bitmaps(), strict=True))
    young("export", file, "--format", "record", "-o", tmp_path / "part", "--windows", "5:80")
    with YoungRecord.open(file) as a, YoungRecord.open(tmp_path / "part") as b:
        assert all(x == y for x, y in zip(a.bitmaps(5), b.bitmaps(), strict=True))
    young("export", file, "--format", "gfns", "-o", tmp_path / "g", "--windows", "0:40",
          "--min-share", "50%")  # fmt: skip
    assert len((tmp_path / "g").read_text().split()) == 656
    young("export", file, "--format", "gfns-bin", "-o", tmp_path / "b")
    assert np.fromfile(tmp_path / "b", "<u8").size == 256 + 400 + 300 + 80


def test_compare_records_and_formats(young, file):
    found = parsed(young, "compare", file, file, "--format", "npt,stage2-2m,radix")
    jaccard = {row["view"]: row["jaccard_ratio"] for row in found["views"]}
    assert jaccard["r.young (guestpt, npt)"] == jaccard["format npt"] == 1.0
    assert jaccard["format radix"] == 1.0
    rough = next(row for row in found["views"] if row["view"] == "format stage2-2m")
    assert rough["recall_ratio"] == 1.0
    extra = {cause: n for cause, n in rough["extra_pages"].items() if n}
    assert extra == {"coarse": rough["young_pages"] - rough["reference_pages"]}


def test_whatif(young, file):
    words = (file, "--workers", "0", "--no-check", "--set", "n_generations=4,5")
    found = parsed(young, "whatif", *words, "--budget", "1M,8M,50%")
    assert sorted(row["options"]["n_generations"] for row in found["cases"]) == [*"444555"]
    assert found["error_bars"] == []
    by_budget = {row["budget_pages"]: row["refaults"] for row in found["cases"]}
    assert set(by_budget) == {256, 2048, 518}
    assert by_budget[256] > by_budget[2048] == 0
    assert "no error bar was measured" in young("whatif", *words, "--budget", "1M")


def test_whatif_without_dask_replays_in_this_process(capsys, monkeypatch, file):
    words = ["young", "whatif", str(file), "--no-check", "--budget", "1M", "--json"]
    assert main([*words, "--workers", "0"]) == 0
    wanted = json.loads(capsys.readouterr().out)
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(words) == 0
    done = capsys.readouterr()
    assert json.loads(done.out) == wanted
    assert done.err == "Dask is not installed: replaying in this process\n"
    assert main([*words, "--workers", "2"]) == 126
    assert "--workers 0" in capsys.readouterr().err


def test_help_names_every_command(young):
    text = young("--help")
    for name in ("record", "stat", "wss", "ages", "hot", "diff", "page", "gfn", "compare",
                 "whatif", "export", "import"):  # fmt: skip
        assert f"\n  {name} " in text
        assert main(["young", name, "--help"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("wss", "{tmp}/none"), "no such record; create one with kvmhost young record"),
        (("wss", "{file}", "--windows", "0:81"), "has windows 0 to 79"),
        (("wss", "{file}", "--range", "0:0x1001"), "the record has [0x0, 0x1000)"),
        (("hot", "{file}", "--min-share", "0"), "need a share above 0"),
        (("diff", "{file}"), "name two stretches"),
        (("page", "{file}", "4096"), "gfns [0x1000, 0x1001) are out of range"),
        (("gfn", "0x1000000", "{file}"), "is in no memslot; memslots: slot 0 gfns [0x0, 0x1000)"),
        (("export", "{file}", "--format", "damon", "-o", "{file}"), "there already"),
        (("export", "{file}", "--format", "damon", "-o", "{tmp}/a/b"), "No such file or directory"),
        (("import", "{tmp}/x", "--format", "damon", "-o", "{tmp}/y"), "No such file"),
        (("compare", "{file}"), "nothing to be compared with"),
        (("compare", "{file}", "--format", "x86"), "there are: npt, npt-2m"),
        (("whatif", "{file}", "--budget", "0%"), "need a share above 0"),
        (("whatif", "{file}", "--budget", "1M", "--policy", "best"), "unknown policy 'best'"),
        (
            ("import", "{file}", "--format", "ranges", "-o", "{tmp}/y", "--interval", "2s"),
            "--format ranges takes no --interval",
        ),
        (
            ("import", "{file}", "--format", "ranges", "-o", "{tmp}/y", "--range", "0:5"),
            "--format ranges takes no --range",
        ),
        (
            ("import", "{file}", "--format", "dirty", "-o", "{tmp}/y", "--target-id", "5"),
            "--format dirty takes no --target-id",
        ),
        (("record", "v", "-o", "{file}"), "--append to it"),
        (("record", "v", "-o", "{tmp}/a/b"), "there is no directory"),
        (("record", "v", "x/v.sock", "-o", "{tmp}/d"), "have the same name"),
    ],
)
def test_what_a_person_needs_when_it_is_wrong(young, file, tmp_path, words, said):
    filled = [word.format(tmp=tmp_path, file=file) for word in words]
    assert said in young(*filled, code=2)


def test_damage_is_exit_code_2_and_names_the_file(young, file):
    raw = bytearray((file / "young" / "0.0").read_bytes())
    raw[len(raw) // 2] ^= 4
    (file / "young" / "0.0").write_bytes(raw)
    for words in (("hot",), ("page", 300), ("wss", "--range", "0:64"), ("stat", "--full")):
        given = [words[0], file, *words[1:]]
        assert f"{file}/young/0.0: chunk at offset 0x0" in young(*given, code=2)
    shutil.rmtree(file / "ages")
    assert f"{file}/ages/0.0: chunk: is missing" in young("wss", file, code=2)
    (file / METADATA_FILE).write_text("{}")
    assert "metadata: is invalid" in young("stat", file, code=2)


def test_a_cut_tail_is_a_warning(tmp_path, capsys):
    writer = write(
        tmp_path / "r", 0, [Window(64, frozenset({i}), None, i, i + 1) for i in range(9)]
    )
    shutil.copytree(tmp_path / "r", tmp_path / "cut")
    writer.close()
    raw = (tmp_path / "cut" / "tail.log").read_bytes()
    (tmp_path / "cut" / "tail.log").write_bytes(raw[:-3])
    assert main(["young", "wss", str(tmp_path / "cut"), "--csv"]) == 0
    out = capsys.readouterr()
    assert len(out.out.splitlines()) == 1 + 8
    assert "window 8 is truncated" in out.err


# -- on running VMs ---------------------------------------------------------------

PARAMS = {"pages": 2048, "hot": 512, "cold": 0, "scan_every": 0, "epochs": 0}


@pytest.fixture
def start_vm(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(tmp_path / "run"))
    started = []

    def start(name):
        pairs = [word for k, v in PARAMS.items() for word in ("--param", f"{k}={v}")]
        words = ["run", "hotcold", "--name", name, "--mem", "16M", *pairs]
        process = subprocess.Popen(
            [sys.executable, "-m", "kvmhost", *words], stderr=subprocess.DEVNULL
        )
        client = Client(name)
        started.append((process, client))

        def answers():
            try:
                return client.state().doorbells > 3
            except VmGoneError:
                assert process.poll() is None
                return False

        until(answers, "the first epochs")
        return client

    yield start
    for process, client in started:
        client.close()
        process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE_S)


def recorder(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "kvmhost", "young", "record", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def windows_in(path):
    try:
        with YoungRecord.open(path) as record:
            return len(record)
    except ValueError:
        return 0


def touched_in(path):
    with YoungRecord.open(path) as record:
        return set(record.between(0, None, "or").gfns().tolist())


def test_record_a_vm_and_go_on(start_vm, tmp_path, young):
    vm = start_vm("v")
    out = tmp_path / "v.young"
    text = young("record", "v", "-o", out, "--interval", "0.05", "--count", "5")
    assert text.startswith(f"{out}: 5 windows of v")
    hot = set(hotcold_gfns(vm.state().params, 1).tolist())
    with YoungRecord.open(out) as record:
        assert record.name == "v"
        assert record.metadata.sessions[0].facts["image"] == "hotcold.elf"
        # Of calibration on KVM, by design with the emulated engine.
        assert re.match(r"\w.* walks? |KVM shadows ", record.provenance(0).evidence)
        assert record.memslots()[0].hva == vm.memory_map().memslots[0].hva
        touched = set(record.between(0, None, "or").gfns().tolist())
        assert not touched & (set(range(1024, 1024 + 2048)) - hot)
        ends = record.column("end_ns")
        assert (np.diff(ends) > 0).all()
        assert (record.column("start_ns")[1:] == ends[:-1]).all()
        assert record.column("harvest_ns").min() > 0
    process = recorder("v", "-o", out, "--append", "--interval", "0.05")
    until(lambda: windows_in(out) > 7 and hot <= touched_in(out), "windows of a whole epoch")
    busy = young("record", "v", "-o", out, "--append", "--count", "1", code=2)
    assert "another process is writing this record" in busy
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (0, "")
    assert "in all)" in said
    assert "; stopped" in said
    with YoungRecord.open(out) as record:
        assert len(record.metadata.sessions) == 1  # nothing about it has changed
        assert len(record) > 7


def test_record_several_vms_until_one_ends(start_vm, tmp_path):
    first, _ = start_vm("a"), start_vm("b")
    out = tmp_path / "both"
    process = recorder("a", "b", "-o", out, "--interval", "0.05")
    until(lambda: windows_in(out / "a") > 3 and windows_in(out / "b") > 3, "windows of both")
    first.stop()
    until(lambda: not _is_written(out / "a"), "the end of the first")
    seen = windows_in(out / "b")
    until(lambda: windows_in(out / "b") > seen + 2, "the other goes on")
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (0, "")
    assert f"{out / 'a'}: " in said
    assert "the VM is gone" in said


def _is_written(path):
    with YoungRecord.open(path) as record:
        return record.is_being_written()


def test_record_killed_goes_on(start_vm, tmp_path, young):
    start_vm("v")
    out = tmp_path / "v.young"
    process = recorder("v", "-o", out, "--interval", "0.02")
    until(lambda: windows_in(out) > 70, "a sealed block and a tail")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = windows_in(out)
    assert f"({before + 3} in all)" in young(
        "record", "v", "-o", out, "--append", "--interval", "0.02", "--count", "3"
    )


def test_page_and_gfn_of_a_vm(start_vm, young):
    vm = start_vm("v")
    vm.harvest()
    found = parsed(young, "page", "v", "0x400")
    assert (found["gfn"], found["history"]) == (0x400, None)
    now = found["now"]
    assert (now["page"]["slot"], now["tracker"]) == (0, vm.state().tracker)
    hva = vm.memory_map().memslots[0].hva
    place = parsed(young, "gfn", hex(hva + 0x400_010), "v", "--kind", "hva")
    assert (place["gfn"], place["gpa"]) == (0x400, 0x400_010)


def test_record_without_a_vm(tmp_path, monkeypatch, young):
    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(tmp_path / "run"))
    assert "nothing answers" in young("record", "nobody", "-o", tmp_path / "x", code=1)
    assert not (tmp_path / "x").exists()


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_compare_trackers_on_a_guest(young, tmp_path):
    words = ["--epochs", "4", "--mem", "16M", "--tracker", "guestpt,uffd"]
    for name, value in {**PARAMS, "epochs": 0}.items():
        words += ["--param", f"{name}={value}"]
    found = parsed(young, "compare", "--guest", "hotcold", *words, "-o", tmp_path / "c")
    (row,) = found["views"]
    assert (row["n_windows"], row["recall_ratio"]) == (4, 1.0)
    assert not any(row["missing_pages"].values())
    # What walks the tables shows in the host's; nothing else differs.
    assert {cause for cause, n in row["extra_pages"].items() if n} <= {"tables"}
    assert windows_in(tmp_path / "c" / "guestpt") == 4


@pytest.mark.requires_uffd
def test_emulated_trackers_differ_by_the_guests_code_only(young, tmp_path):
    """Unicorn runs a translation that it kept without reading the page of code again."""
    words = ["--engine", "emulated", "--epochs", "4", "--mem", "16M"]
    words += [word for k, v in PARAMS.items() for word in ("--param", f"{k}={v}")]
    out = tmp_path / "c"
    young("compare", "--guest", "hotcold", *words, "--tracker", "guestpt,uffd", "-o", out)
    with YoungRecord.open(out / "guestpt") as one, YoungRecord.open(out / "uffd") as other:
        pairs = [
            (set(a.gfns().tolist()), set(b.gfns().tolist()))
            for a, b in zip(one.bitmaps(), other.bitmaps(), strict=True)
        ]
    assert len(pairs) == 4
    code = range(IMAGE_GPA >> 12, GFN_START)
    for in_tables, in_host in pairs:
        assert in_tables & set(range(GFN_START, GFN_START + PARAMS["pages"]))
        assert in_tables - in_host <= set(code)
        assert not (in_host - in_tables) & set(range(GFN_START + PARAMS["pages"]))


@pytest.mark.requires_uffd
def test_predictions_against_a_real_run():
    from kvmhost.tools.young.realrun import measure_error

    bar = measure_error("lru_gen", budgets=(0.5,), epochs=12)
    (run,) = bar.runs
    assert run.predicted > 0
    assert run.real > 0
    assert 0.5 < run.ratio < 2
    low, high = bar.around(100.0)
    assert low <= 100 <= high
    assert "real runs here" in bar.line("lru_gen")
