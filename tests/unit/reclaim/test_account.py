"""What is kept: decisions, page histories, metrics, and the dashboard that shows them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import threading
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from waiting import DEADLINE_S

from kvmhost.bitmap import pack
from kvmhost.control import schema
from kvmhost.reclaim.account import decisions as decisions_module
from kvmhost.reclaim.account.decisions import DecisionKind, Decisions, EvictReason, to_runs
from kvmhost.reclaim.account.history import OUTCOMES, WINDOWS, PageAction, PageHistory
from kvmhost.reclaim.control import metrics
from kvmhost.reclaim.daemon import Daemon
from kvmhost.reclaim.errors import ConfigError
from kvmhost.reclaim.loss.clearing import Clearing
from kvmhost.reclaim.pressure.backoff import Backoff
from kvmhost.reclaim.settings.config import load
from kvmhost.reclaim.vm.totals import Totals
from kvmhost.units import Bytes, Mark

DOCS = Path(__file__).resolve().parents[3] / "docs"


# -- decisions ----------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 300)))
def test_runs_are_the_pages(gfns):
    runs = to_runs(np.array(gfns, dtype=np.int64))
    assert [g for first, n in runs for g in range(first, first + n)] == sorted(set(gfns))
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs))


def test_the_ring_is_bounded_and_found_by_page_vm_and_number():
    ring = Decisions(5)
    for i in range(8):
        ring.add(
            DecisionKind.EVICT,
            f"number {i}",
            vm="ab"[i % 2],
            why=EvictReason.BUDGET,
            gfns=np.array([i, i + 1]),
        )
    assert [d.number for d in ring.last(100)] == [4, 5, 6, 7, 8]
    assert [d.number for d in ring.last(2)] == [7, 8]
    assert [d.number for d in ring.last(100, vm="a")] == [5, 7]
    assert [d.number for d in ring.last(100, gfn=5)] == [5, 6]
    assert [d.number for d in ring.last(100, after=6)] == [7, 8]
    assert sorted(ring.totals()) == [("a", "evict", 4), ("b", "evict", 4)]
    ring.forget("a")
    assert [vm for vm, _, _ in ring.totals()] == ["b"]


def test_the_lists_of_old_decisions_go_before_their_counts(monkeypatch):
    monkeypatch.setattr(decisions_module, "_MAX_RUNS", 10)
    ring = Decisions(100)
    for _ in range(6):
        ring.add(DecisionKind.EVICT, "x", pages=4, gfns=np.array([1, 3, 5, 7]))
    found = ring.last(100)
    assert [len(d.ranges) for d in found] == [0, 0, 0, 0, 4, 4]
    assert [d.n_pages for d in found] == [4] * 6


def test_the_file_has_all_of_them_a_line_each(tmp_path):
    path = tmp_path / "decisions.jsonl"
    path.write_text('{"number":0}\n')
    with Decisions(2, str(path)) as ring:
        threads = [
            threading.Thread(
                target=lambda: [ring.add(DecisionKind.SPARE, "äöü\n", pages=3) for _ in range(50)]
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(201))
    assert lines[5]["kind"] == "spare"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_file_that_cannot_be_opened_and_a_full_disk(tmp_path):
    with pytest.raises(ConfigError, match=r"decisions_file.*No such file"):
        Decisions(5, str(tmp_path / "no" / "file"))
    with Decisions(5, "/dev/full") as ring:
        ring.add(DecisionKind.SPARE, "x")
        assert ring.write_errors == 1
        assert len(ring.last()) == 1


# -- histories ----------------------------------------------------------------


def test_a_page_is_told_from_its_bits_and_acts():
    history = PageHistory(100)
    for number in range(40):
        young = np.zeros(100, bool)
        young[7] = number % 4 == 0
        history.window(pack(young))
    story = history.story(7)
    assert len(story.windows) == WINDOWS
    assert story.young_passes == [37 - 4 * i for i in range(8)]
    gfns = np.array([5, 6, 7, 8])
    history.evicted(gfns, np.array([0, 1, 2, 0], np.uint8), EvictReason.CGROUP)
    history.became_resident(np.array([5]), np.array([50]))
    history.evicted_by_vm(np.array([9]), EvictReason.LIMIT)
    acts = [history.story(g).action for g in (5, 6, 7, 8, 9, 50, 51)]
    assert acts == ["came_back", "pinned", "absent", "evicted", "evicted", "came_first", "none"]
    story = history.story(5)
    assert (story.why, story.evictions, story.refaults, story.action_pass) == ("cgroup", 1, 1, 40)
    assert "near its limit" in story.why_text
    assert history.n_bytes == 100 * 14


def test_counts_stop_at_the_top():
    history = PageHistory(3)
    history._evictions[1] = 65534
    for _ in range(3):
        history.evicted_by_vm(np.array([1]), EvictReason.LIMIT)
    assert history.story(1).evictions == 65535


def test_outcomes_are_those_of_the_pager():
    from kvmhost.pager.pager import EvictOutcome

    names = {"DONE": PageAction.EVICTED, "ERROR": PageAction.FAILED}
    for outcome in EvictOutcome:
        if outcome < len(OUTCOMES):
            assert OUTCOMES[outcome] is names.get(
                outcome.name, PageAction.__members__.get(outcome.name)
            )


def test_every_reason_has_a_text():
    assert all(why.text for why in EvictReason)


# -- metrics ------------------------------------------------------------------


def fake_session(vm="a"):
    totals = Totals(passes=3, harvested=30, young=5, harvest_ns=2_000_000_000, refaulted=4)
    totals.evicted[EvictReason.BUDGET] = 7
    totals.refused["full"] = 2
    totals.spared["holding"] = 9
    pager = {"store_bytes": 100, "latency_ns": [0, 5, 0, 2], "latency_sum_ns": 60}
    return types.SimpleNamespace(
        vm=vm,
        totals=totals,
        pages=types.SimpleNamespace(n_resident=10, n_pages=20),
        budget=None,
        last=types.SimpleNamespace(generations=[(4, 1), (5, 2), (6, 3)], wanted_pages=11),
        reclaim_target=types.SimpleNamespace(
            backoff=Backoff(0.2, 1), stall_controller=None, promotion_controller=None
        ),
        stall=0.25,
        history=None,
        counters=schema.Counters(
            schema.MachineCounters(0, 0, 1.0, 0),
            schema.HarvestTotals(0, 0, 0, 0, 0, n_retouched=12),
            pager,
        ),
        interval_s=2.0,
        loss=types.SimpleNamespace(
            loss=0.02,
            bound=types.SimpleNamespace(max_loss=0.03),
            cost=schema.RearmCost("guestpt", 4000.0, False, 256, 7, 1.0),
            clearing=Clearing(1 / 8, 1.0, 2.0),
            stale_s=lambda interval_s: 16 * interval_s,
        ),
        context=types.SimpleNamespace(
            config=types.SimpleNamespace(daemon=types.SimpleNamespace(interval=1.0))
        ),
        evictor=types.SimpleNamespace(over_pages=3),
        driver=types.SimpleNamespace(policy=types.SimpleNamespace(counters=lambda: {"max_seq": 6})),
    )


@pytest.fixture
def daemon(monkeypatch):
    from kvmhost.reclaim.context import DaemonContext

    config = load(None, {"defaults": {"budget": Mark(size=Bytes(1 << 20))}})
    daemon = Daemon(DaemonContext.of(config), lambda event: None)
    monkeypatch.setattr(daemon, "sessions", lambda: [fake_session(), fake_session("b")])
    daemon.context.decisions.add(DecisionKind.HOLD, "x", vm="a")
    return daemon


def samples(daemon):
    text = metrics.Metrics(daemon).text().decode()
    return [s for family in text_string_to_metric_families(text) for s in family.samples]


def test_metrics_are_prometheus_text_and_say_what_is(daemon):
    found = samples(daemon)

    def value(metric, /, **labels):
        got = [s.value for s in found if s.name == metric and s.labels == labels]
        assert len(got) == 1, (metric, labels)
        return got[0]

    assert value("reclaimd_vms") == 2
    assert value("reclaimd_vm_resident_bytes", vm="b") == 10 * 4096
    assert value("reclaimd_vm_evicted_pages_total", vm="a", why="budget") == 7
    assert value("reclaimd_vm_spared_pages_total", vm="a", cause="holding") == 9
    assert value("reclaimd_vm_harvest_seconds_total", vm="a") == 2
    assert value("reclaimd_vm_generation_pages", vm="a", age="0") == 3
    assert value("reclaimd_vm_policy_max_seq", vm="a") == 6
    assert value("reclaimd_vm_decisions_total", vm="a", kind="hold") == 1
    name = "reclaimd_vm_fault_in_seconds"
    assert value(f"{name}_count", vm="a") == 7
    assert value(f"{name}_bucket", vm="a", le="4e-09") == 5
    assert value(f"{name}_bucket", vm="a", le="1.6e-08") == 7
    assert value(f"{name}_sum", vm="a") == pytest.approx(60e-9)


def test_names_are_all_the_names_there_are(daemon):
    found = {s.name for s in samples(daemon) if not s.name.startswith("reclaimd_process_")}
    listed = {n for n in metrics.names() if not n.startswith("reclaimd_process_")}
    assert found <= listed
    # Policies have counters of their own; the VMs here have one of them.
    assert {n for n in listed - found if not n.startswith("reclaimd_vm_policy_")} == set()


def test_labels_and_names_are_what_promtool_accepts(daemon):
    """No blanks or figures in label values but VM names; names in one form, with their unit."""
    for sample in samples(daemon):
        assert re.fullmatch(r"reclaimd_[a-z0-9_]+", sample.name)
        assert not re.search(r"per_minute|_milli|_kilo|_percent", sample.name)
        for label, value in sample.labels.items():
            assert re.fullmatch(r"[a-zA-Z0-9_.+-]+", value), (sample.name, label, value)
    process = {s.name for s in samples(daemon) if s.name.startswith("reclaimd_process_")}
    assert {n for n in metrics.names() if n.startswith("reclaimd_process_")} <= process


def test_the_dashboard_names_metrics_that_there_are():
    board = json.loads((DOCS / "reclaimd" / "dashboard.json").read_text())
    text = json.dumps(board)
    named = set(re.findall(r"reclaimd_\w+", text))
    assert len(named) > 20
    assert named <= metrics.names()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(places) == len(set(places))


def test_the_page_has_every_metric_and_every_option():
    from kvmhost.reclaim.settings.config import options

    page = (DOCS / "reclaimd.md").read_text()
    for family in (*metrics.PER_VM, *metrics.PER_HOST):
        assert f"`{family.name}" in page, family.name
    for option in options():
        assert f"`{option.key}`" in page, option.key
    for kind in DecisionKind:
        assert f"`{kind.value}`" in page, kind


def test_the_example_configuration_and_the_unit_are_good():
    config = load(DOCS / "reclaimd" / "reclaimd.toml")
    assert config.of_vm("batch-7").weight == 0.5
    assert config.of_vm("db").budget.size == 4 << 30
    tomllib.loads((DOCS / "reclaimd" / "reclaimd.toml").read_text())
    unit = (DOCS / "reclaimd" / "reclaimd.service").read_text()
    assert "Type=notify" in unit
    assert "WatchdogSec=" in unit
    # Without its directory nothing can be written below ProtectSystem=strict, and with the
    # directory removed at the end VMs would lose their sockets.
    assert "RuntimeDirectory=kvmhost" in unit
    assert "RuntimeDirectoryPreserve=yes" in unit


@pytest.mark.parametrize("kind", ["--system", "--user"])
def test_systemd_finds_no_fault_in_the_unit(kind, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing; install systemd")
    done = subprocess.run(
        ["systemd-analyze", kind, "verify", DOCS / "reclaimd" / "reclaimd.service"],
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
