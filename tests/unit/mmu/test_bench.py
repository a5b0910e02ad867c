"""The benchmarks run, and their figures are of the right kind. Speed itself is not tested
here: a busy machine would make such a test lie."""

from __future__ import annotations

import itertools

import pytest
from json_page import checked

from kvmhost.tools.bench import mmu as bench_mmu
from kvmhost.tools.bench import walk as bench_walk
from kvmhost.tools.bench.mmushow import sentence
from kvmhost.tools.bench.mmuways import FORMATS, bench_ways, changes_of
from kvmhost.tools.outputs.benchparts import WayRow


def test_walk_in_small():
    result = bench_walk.run(n_entries=1 << 14, rounds=3)
    assert result.parameters.n_entries == 1 << 14
    assert min(result.old_of_sum_ratio, result.old_of_wide_sum_ratio) > 0
    assert result.young_of_and_ratio > 0
    assert all(row.ns_per_entry > 0 for row in result.loops)
    with pytest.raises(ValueError, match="multiple of 512"):
        bench_walk.run(n_entries=1000)


def test_scan_and_sparse_in_small():
    scan = bench_mmu.bench_scan(1 << 13, 1)
    assert [row.table_format for row in scan] == list(FORMATS)
    sparse = bench_mmu.bench_sparse(1, space_pages=1 << 22)
    assert all(row.sparse_of_alone_ratio > 0 for row in sparse)


def test_scale_in_small():
    (row,) = bench_mmu.bench_scale(gib=1)
    assert row.n_entries == 1 << 18
    assert row.table_bytes == 4096 * (512 + 1 + 1 + 1)


def test_aging_in_small():
    result = bench_mmu.bench_aging(threads=(1, 2), pages_per_vcpu=2048, rounds=1)
    rows = {(row.n_vcpus, row.aging): row for row in result}
    assert rows[2, "none"].slowdown_ratio == 1.0
    assert set(rows) == {(n, how) for n in (1, 2) for how in ("none", "locked", "lockless")}


def test_ways_in_small():
    ways = bench_ways(n_pages=2048, n_accesses=50_000, rounds=1)
    changes = changes_of(ways)
    for name in FORMATS:
        assert len([way for way in ways if way.table_format == name]) == 8
        of_format = [row for row in changes if row.table_format == name]
        assert [row.change for row in of_format] == ["batching", "no lock", "no flush"]
        for row in of_format:
            assert row.min_cost_ratio <= row.cost_ratio <= row.max_cost_ratio


def test_a_change_is_compared_with_its_own_pairs():
    """A page costs 16 ns; batching halves that, no lock divides it by 3, no flush by 5."""
    ways = [
        WayRow(
            table_format="npt",
            batch_pages=batch,
            locked=locked,
            flush=flush,
            ns_per_page=16 / (2 if batch > 1 else 1) / (1 if locked else 3) / (1 if flush else 5),
            slowdown_ratio=3.0 if flush else 2.0,
        )
        for batch, locked, flush in itertools.product((1, 64), (True, False), (True, False))
    ]
    found = {row.change: row for row in changes_of(ways)}
    assert {name: round(row.cost_ratio, 6) for name, row in found.items()} == {
        "batching": 2,
        "no lock": 3,
        "no flush": 5,
    }
    assert found["no flush"].vcpu_ratio == pytest.approx(1.5)
    assert found["batching"].vcpu_ratio == pytest.approx(1)
    assert sentence("npt", list(found.values())).startswith("npt: no flush divides")


def part_in_small(part, arguments):
    return lambda *_: part(*arguments)


def test_commands(capsys, monkeypatch):
    small = {
        "bench_scan": (1 << 13, 1),
        "bench_sparse": (1, 1 << 20),
        "bench_scale": (1,),
        "bench_aging": ((1,), 2048, 1),
    }
    for name, arguments in small.items():
        monkeypatch.setattr(bench_mmu, name, part_in_small(getattr(bench_mmu, name), arguments))
    monkeypatch.setattr(
        bench_mmu, "bench_ways", lambda formats: bench_ways(2048, 50_000, 1, formats)
    )
    assert bench_mmu.main(["--format", "npt"]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("-- ")] == [
        f"-- {part}" for part in bench_mmu.PARTS
    ]
    assert bench_mmu.main(["--format", "npt", "--json"]) == 0
    (found,) = checked("bench mmu", capsys.readouterr().out)
    assert all(found[part] for part in bench_mmu.PARTS)
    assert bench_mmu.main(["--part", "sparse", "--json"]) == 0
    (found,) = checked("bench mmu", capsys.readouterr().out)
    assert [part for part in bench_mmu.PARTS if found[part]] == ["sparse"]
    with pytest.raises(SystemExit):
        bench_mmu.main(["--part", "fast"])
    capsys.readouterr()
    assert bench_walk.main(["--entries", "8192", "--rounds", "1"]) == 0
    assert "all young" in capsys.readouterr().out
    assert bench_walk.main(["--entries", "8192", "--rounds", "1", "--json"]) == 0
    (found,) = checked("bench walk", capsys.readouterr().out)
    assert found["parameters"] == {"n_entries": 8192, "rounds": 1}
