"""The benchmark of records runs, and measures what it says."""

from __future__ import annotations

import pytest
from json_page import checked

from kvmhost.tools.main import main

pytest.importorskip("matplotlib")


def test_bench_young(capsys):
    words = ["--mem", "512M", "--count", "70", "--rounds", "1", "--json"]
    assert main(["bench", "young", *words]) == 0
    (found,) = checked("bench young", capsys.readouterr().out)
    small, large = found["records"]
    assert large["bits_bytes"] == 70 * (512 << 20) // 4096 // 8
    # A hot set of a tenth, half of it at random, costs 3.2 KiB a window by its entropy.
    assert 70 * 3200 < small["stored_bytes"] < 70 * 5825
    assert small["append_ms"] > 0
    queries = {row["query"]: row for row in found["queries"]}
    assert set(queries) == {"open", "wss", "bitmap", "hot", "heatmap", "html"}
    for row in queries.values():
        assert row["median_s"] > 0
        assert row["peak_rss_bytes"] > 1 << 20
    assert main(["bench", "young", *words[:-1]]) == 0
    shown = capsys.readouterr().out
    assert "at most 2 ms" in shown
    assert "at most 1024 MiB" in shown
