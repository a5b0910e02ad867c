"""The benchmarks run, and their figures are of the right kind. Speed itself is not tested
here: a busy machine would make such a test lie."""

from __future__ import annotations

import json

import pytest

from kvmhost.tools.bench import mmu as bench_mmu
from kvmhost.tools.bench import walk as bench_walk


def test_walk_in_small():
    result = bench_walk.run(n_entries=1 << 14, rounds=3)
    assert result["n_entries"] == 1 << 14
    for ratio in ("old_of_sum", "old_of_wide_sum", "young_of_and"):
        assert result[ratio] > 0
    with pytest.raises(ValueError, match="multiple of 512"):
        bench_walk.run(n_entries=1000)


def test_scan_and_sparse_in_small():
    scan = bench_mmu.bench_scan(1 << 13, 1)
    assert set(scan) == set(bench_mmu.FORMATS)
    sparse = bench_mmu.bench_sparse(1, space_pages=1 << 22)
    assert all(r["sparse_of_alone"] > 0 for r in sparse.values())


def test_scale_in_small():
    result = bench_mmu.bench_scale(gib=1)
    assert result["entries"] == 1 << 18
    assert result["table_bytes"] == 4096 * (512 + 1 + 1 + 1)


def test_aging_in_small():
    result = bench_mmu.bench_aging(threads=(1, 2), pages_per_vcpu=2048, rounds=1)
    assert result["2"]["none"]["slowdown"] == 1.0
    assert set(result["1"]) == {"none", "locked", "lockless"}


def test_ways_in_small():
    result = bench_mmu.bench_ways(n_pages=2048, n_accesses=50_000, rounds=1)
    for name in bench_mmu.FORMATS:
        assert len(result[name]["cells"]) == 8
        assert result[name]["sentence"].startswith(f"{name}: ")
        for change in ("batching", "no lock", "no flush"):
            factor = result[name]["factors"][change]
            assert factor["cost_low"] <= factor["cost"] <= factor["cost_high"]


def test_commands(capsys, monkeypatch):
    monkeypatch.setitem(bench_mmu.PARTS, "sparse", lambda: bench_mmu.bench_sparse(1, 1 << 20))
    assert bench_mmu.main(["--part", "sparse"]) == 0
    assert "-- sparse" in capsys.readouterr().out
    assert bench_mmu.main(["--part", "sparse", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"sparse"}
    with pytest.raises(SystemExit):
        bench_mmu.main(["--part", "fast"])
    capsys.readouterr()
    assert bench_walk.main(["--entries", "8192", "--rounds", "1"]) == 0
    assert "all young" in capsys.readouterr().out
