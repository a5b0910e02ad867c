"""kvmhost bench reclaim: its parts on small guests, and what its figures must obey."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from json_page import checked

from kvmhost.bitmap import unpack
from kvmhost.errors import HostError, LayoutError
from kvmhost.guests.workloads import hotcold_gfns
from kvmhost.reclaim.policy.lru_gen import LruGen
from kvmhost.tools.bench import reclaim
from kvmhost.tools.bench.reclaim import guests, rows, show, trace
from kvmhost.tools.bench.reclaim.inprocess import Reclaimer
from kvmhost.tools.bench.reclaim.workloads import WORKLOADS, guest_params
from kvmhost.tools.outputs.base import line_of


def quiet(text):
    pass


def test_traces_are_what_the_guest_touches():
    params = guest_params(WORKLOADS["scan"].guests[0], 512)
    found = trace.windows_of(params, 5)
    assert [now for now, _ in found] == [i * 10**9 for i in range(5)]
    for epoch, (_, words) in enumerate(found):
        assert (
            np.flatnonzero(unpack(words, 512)).tolist()
            == (hotcold_gfns(params, epoch) - params["gfn_start"]).tolist()
        )


def test_trace_rows_add_up_and_can_be_shown(tmp_path):
    report = reclaim.run(
        ["trace"], workloads=["phase", "two"], pages=512, windows=20, budgets=(0.5,), tell=quiet
    )
    by_case = {(row.workload, row.policy): row for row in report.trace}
    for (workload, _), row in by_case.items():
        assert row.refaults >= by_case[workload, "belady"].refaults
        assert row.refaults <= row.evictions
        assert row.wrong_evictions <= row.refaults
    text = show.tables(report)
    assert "two       50%" in text
    target = tmp_path / "out.png"
    show.plot(report, target)
    assert target.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(HostError, match="Is a directory"):
        show.need_file(tmp_path)


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_a_reclaimer_holds_a_guest_to_its_budget_and_the_guest_finds_its_data():
    """The guest checks every page it touches, and stops at the first lost byte."""
    params = guest_params(lambda p: {"hot": p // 4, "cold": 64}, 2048) | {"epochs": 0}
    with guests.booted(params) as machine:
        whole = Reclaimer(machine, None, 0)
        touched = int(whole.resident().sum())
        budget = touched // 2
        policy = LruGen(whole.n_pages, probes=True)
        reclaimer = Reclaimer(machine, policy, budget)
        assert int(reclaimer.resident().sum()) <= budget
        hot = range(1024 + 512, 1024 + 1024)
        for epoch in range(1, 25):
            machine.run_epoch()
            done = reclaimer.run_pass()
            young = set(np.flatnonzero(unpack(done.young, whole.n_pages)).tolist())
            if epoch > 2:
                # Dense, so swept every time; and touched in every epoch.
                assert young >= set(hot)
            assert int(reclaimer.resident().sum()) <= budget
        assert reclaimer.resident()[list(hot)].all()
        assert reclaimer.refaulted_pages > 0


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_rows_and_guests_run_on_a_small_scale(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "_REPEATS", 1)
    found = rows.run(512, quiet)
    assert [row.aging for row in found] == [
        "batched, no lock",
        "page by page, locked",
        "classic",
    ]
    assert all(row.fault_ins > 0 for row in found)
    batched, singly, classic = found
    # KVM has flushed for single pages, and a batch needs far fewer flushes.
    assert batched.n_single_tests == 0
    assert singly.n_single_tests > 0
    assert classic.n_single_tests > 0
    assert singly.n_flush_requests > 2 * batched.n_flush_requests > 0
    for row in found:
        assert 0 < row.test_s + row.rearm_s < row.second_pass_s
    monkeypatch.setattr(guests, "_SETTLE_S", 0.5)
    one = guests._measure("hotcold", "lru_gen", 1024, 1.0, 0.5)
    assert one.throughput_of_no_limit_ratio > 0
    assert one.fault_ins_per_epoch > 0
    assert one.refaulted_pages >= one.wrong_evictions
    (cost, _) = guests.cost(64 << 20, 1.0, quiet)
    assert 0 < cost.policy_percent_per_gib < cost.busy_percent_per_gib
    report = msgspec.structs.replace(
        reclaim.run([], tell=quiet), guests=[one], rows=found, cost=[cost]
    )
    assert "lru_gen" in show.tables(report)
    checked("bench reclaim", line_of(report) + "\n")
    target = tmp_path / "guests.png"
    show.plot(report, target)
    assert target.read_bytes().startswith(b"\x89PNG")


def test_a_picture_needs_a_part_that_it_draws(tmp_path):
    with pytest.raises(LayoutError, match="draws parts trace and guests"):
        reclaim.main(["--part", "rows", "-o", str(tmp_path / "x.png")])


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_a_test_of_one_page_waits_for_the_lock_and_makes_kvm_flush():
    params = guest_params(lambda p: {"hot": p // 4}, 512) | {"epochs": 0}
    with guests.booted(params) as machine:
        reclaimer = rows.PageByPage(machine, None, 0)
        tracker = machine.use_tracker("guestpt")
        machine.run_epoch()
        # Pages of its data, which it reads and writes in each epoch.
        young = tracker.harvest(0, reclaimer.n_pages, False).gfns()[-16:].tolist()
        before = rows._remote_flushes(machine)
        assert all(reclaimer.clear_flush_young(gfn) for gfn in young)
        assert rows._remote_flushes(machine) - before >= len(young) == 16
        assert not any(reclaimer.clear_flush_young(gfn) for gfn in young)
        assert reclaimer.tested == 32
        # The pages are armed again: the next epoch makes them young.
        machine.run_epoch()
        assert set(young) <= set(tracker.harvest(0, reclaimer.n_pages, False).gfns().tolist())
