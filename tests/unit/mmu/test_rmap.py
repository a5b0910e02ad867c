"""The lock bit of reverse maps, in all interleavings."""

from __future__ import annotations

import pytest

from kvmhost.mmu.rmap import explore_rmap


@pytest.mark.parametrize("agers", [1, 2])
def test_aging_under_the_lock_bit_walks_no_freed_descriptor_and_loses_no_change(agers):
    report = explore_rmap(uses_bit=True, agers=agers)
    assert report.schedules > 10
    assert (report.failed, report.deadlocks) == (0, 0)


def test_aging_without_any_lock_walks_what_was_freed():
    report = explore_rmap(uses_bit=False, agers=1)
    assert 0 < report.failed < report.schedules
    assert report.deadlocks == 0
    assert any("remove_entry" in step for step in report.example)
