"""Policies by name; a plug-in is a real package, made from the example in the documentation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvmhost.bitmap import pack
from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy import registry
from kvmhost.reclaim.policy.lru_gen import LruGen
from kvmhost.reclaim.policy.replay import replay

DOCS = Path(__file__).resolve().parents[4] / "docs" / "policies.md"


def test_built_in_policies():
    offers = registry.offers()
    assert list(offers)[:4] == ["lru_gen", "classic", "age", "random"]
    assert all(offers[name].works for name in registry.BUILT_IN)
    for name in registry.BUILT_IN:
        policy = registry.create(name, 100)
        assert (policy.name, policy.n_pages) == (name, 100)


def test_options():
    policy = registry.create("lru_gen", 64, {"n_generations": 6, "min_ttl_ms": 1000})
    assert isinstance(policy, LruGen)
    assert (policy.n_generations, policy.min_ttl_ms) == (6, 1000)
    assert registry.options_of("random") == {"seed": 1}
    with pytest.raises(
        LayoutError, match=r"policy classic: no option 'speed' \(it takes: probes\)"
    ):
        registry.create("classic", 8, {"speed": 1})
    with pytest.raises(LayoutError, match=r"no option 'x' .*takes: target_percent, percentile"):
        registry.create("age", 8, {"x": 1})
    with pytest.raises(LayoutError, match=r"unknown policy 'fifo' \(there are: lru_gen, classic, "):
        registry.create("fifo", 8)


def example():
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (found,) = (block for block in blocks if "class Fifo" in block)
    return found


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install packages with entry points as pip would leave them."""

    def install(module, source, entries):
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{entries}\n")

    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_the_documented_example_works_as_a_plug_in(installed):
    source = example()
    assert sum(bool(line.strip()) for line in source.splitlines()) <= 30
    installed("kvmhost_fifo", source, "fifo = kvmhost_fifo:Fifo")
    offer = registry.offers()["fifo"]
    assert (offer.works, offer.source) == (True, "kvmhost_fifo 1.0")
    bits = np.zeros((3, 64), bool)
    bits[0, :4] = bits[1, 4:6] = bits[2, 0] = True
    result = replay([(i, pack(b)) for i, b in enumerate(bits)], registry.create("fifo", 64), 4)
    # The first two in are the first two out, and one of them comes back.
    assert (result.evictions, result.refaults, result.forced_evictions) == (3, 1, 0)


def test_only_the_plug_in_that_is_asked_for_is_imported(installed):
    installed("kvmhost_wanted", example(), "wanted = kvmhost_wanted:Fifo")
    installed("kvmhost_other", example(), "other = kvmhost_other:Fifo")
    with pytest.raises(LayoutError, match=r"there are: lru_gen, .*other, wanted"):
        registry.create("absent", 8)
    registry.create("lru_gen", 8)
    assert not {"kvmhost_wanted", "kvmhost_other"} & set(sys.modules)
    registry.create("wanted", 8)
    assert "kvmhost_wanted" in sys.modules
    assert "kvmhost_other" not in sys.modules


def test_a_plug_in_cannot_take_a_name_and_a_broken_one_harms_nobody(installed):
    installed("kvmhost_thief", "class Mine: pass", "lru_gen = kvmhost_thief:Mine")
    installed("kvmhost_broken", "raise RuntimeError('no hardware')", "broken = kvmhost_broken:X")
    installed("kvmhost_missing", "", "missing = kvmhost_missing:Policy")
    installed("kvmhost_value", "Policy = 7", "value = kvmhost_value:Policy")
    installed(
        "kvmhost_half", "class Half:\n    def __init__(self, n): pass", "half = kvmhost_half:Half"
    )
    offers = registry.offers()
    assert offers["lru_gen"].source == "built in"
    assert offers["lru_gen@kvmhost_thief"].reason == "the name is taken (built in)"
    assert offers["broken"].reason == "RuntimeError: no hardware"
    assert "has no attribute 'Policy'" in offers["missing"].reason
    assert offers["value"].reason == "kvmhost_value:Policy cannot be called"
    assert registry.create("lru_gen", 8).name == "lru_gen"
    with pytest.raises(LayoutError, match=r"'broken' \(kvmhost_broken 1.0\): RuntimeError"):
        registry.create("broken", 8)
    with pytest.raises(LayoutError, match=r"half \(kvmhost_half 1.0\): has no method plan"):
        registry.create("half", 8)


def test_the_command_of_the_documentation_prints_its_rows():
    """One small trace, as a user would run it."""
    command = "bench reclaim --part trace --workload zipf --pages 1024 --count 30 --json"
    done = subprocess.run(
        [sys.executable, "-m", "kvmhost", *command.split()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=DOCS.parent.parent,
    )
    rows = json.loads(done.stdout)["trace"]
    found = {(row["budget_share"], row["policy"]): row["refaults"] for row in rows}
    for budget in (0.75, 0.5, 0.25):
        assert found[budget, "belady"] <= min(n for (b, _), n in found.items() if b == budget)
    assert found[0.5, "lru_gen"] < found[0.5, "random"]
