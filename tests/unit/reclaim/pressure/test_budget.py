from __future__ import annotations

import pytest

from kvmhost.errors import LayoutError
from kvmhost.reclaim.pressure.budget import Budget


def test_marks_default_to_shares():
    assert Budget.of(100 << 20) == Budget(100 << 20, 95 << 20, 85 << 20)
    assert Budget.of(100 << 20, high_bytes=50 << 20).low_bytes == 50 << 20


def test_excess_counts_down_to_the_low_mark_from_above_the_high_mark():
    budget = Budget(100 * 4096, 90 * 4096, 80 * 4096)
    assert budget.excess_pages(90) == 0
    assert budget.excess_pages(91) == 11
    assert budget.excess_pages(500) == 420
    assert budget.excess_pages(0) == 0


@pytest.mark.parametrize("levels", [(0, 0, 0), (4095, 1, 1), (8192, 4096, 5000), (8192, 9000, 1)])
def test_levels_out_of_order(levels):
    with pytest.raises(LayoutError, match="budget"):
        Budget(*levels)
