"""The benchmark of records runs, and measures what it says."""

from __future__ import annotations

import json

import pytest

from kvmhost.tools.main import main

pytest.importorskip("matplotlib")


def test_bench_young(capsys):
    words = ["--mem", "512M", "--count", "70", "--rounds", "1", "--json"]
    assert main(["bench", "young", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["large_bits_gib"] == pytest.approx(70 * 16 / 2**20)
    # A hot set of a tenth, half of it at random, costs 3.2 KiB a window by its entropy.
    assert 70 * 3200 / 2**20 < found["small_mib"] < 70 * 5825 / 2**20
    for name in ("append_ms", "open_s", "wss_s", "hot_s", "heatmap_s", "heatmap_rss_mib"):
        assert found[name] > 0
