"""``kvmhost bench pager``: the figures are there, and of what they say they are."""

from __future__ import annotations

import io

import pytest
from json_page import checked
from waiting import until

from kvmhost.tools.bench import pager
from kvmhost.tools.main import main
from kvmhost.tools.outputs.benchparts import CodecRow

pytestmark = pytest.mark.requires_uffd


def test_codecs_on_every_content() -> None:
    rows = {(row.content, row.codec): row for row in pager.run_codecs(64, 1)}
    assert {content for content, _ in rows} == set(pager.CONTENTS)
    assert rows["zero", "lz4"].same_filled_pages == 64
    assert rows["zero", "lz4"].compression_ratio is None
    assert rows["random", "lz4"].raw_pages == 64
    assert rows["random", "lz4"].compression_ratio == 1.0
    assert rows["text", "zstd"].compression_ratio > rows["text", "lz4"].compression_ratio > 1
    assert all(row.put_ns_per_page > 0 and row.get_ns_per_page > 0 for row in rows.values())


def test_faults_of_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--part", "faults", "--pages", "256", "--rounds", "1", "--prefetch", "4", "--json"]
    assert main(["bench", "pager", *argv]) == 0
    (found,) = checked("bench pager", capsys.readouterr().out)
    assert (found["codecs"], found["overhead"]) == ([], None)
    assert found["parameters"]["prefetch_pages"] == 4
    rows = {row["pager"]: row for row in found["faults"]}
    assert set(rows) == {
        "minimal C",
        "pager lz4",
        "pager zstd",
        "pager none",
        "pager lz4, file",
        "pager lz4, prefetch 4",
    }
    assert rows["minimal C"]["p50_of_minimal_ratio"] == 1
    assert all(0 < row["p50_ns"] <= row["p99_ns"] for row in rows.values())


def test_codecs_and_overhead_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--part", "codecs,overhead", "--pages", "32", "--rounds", "1", "--mem", "64M"]
    assert main(["bench", "pager", *argv, "--json"]) == 0
    (found,) = checked("bench pager", capsys.readouterr().out)
    assert {row["content"] for row in found["codecs"]} == set(pager.CONTENTS)
    assert found["overhead"]["private_share"] == found["overhead"]["private_bytes_per_gib"] / 2**30
    assert found["host"]["n_cpus"] >= 1


@pytest.mark.slow
def test_overhead_is_within_its_bound() -> None:
    row = pager.run_overhead()
    # A GiB has 262,144 pages; the tables of the pager alone are ten bytes for each.
    assert 1 << 20 < row.private_bytes_per_gib < 0.005 * (1 << 30)


def test_a_terminal_shows_progress_while_codecs_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", stream)

    def measure(n_pages: int, rounds: int) -> list[CodecRow]:
        until(lambda: "s] bench pager: codecs" in stream.getvalue(), "progress on the terminal")
        return []

    monkeypatch.setattr(pager, "run_codecs", measure)
    assert pager.main(["--part", "codecs"]) == 0
