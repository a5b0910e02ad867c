"""Sample masks: every page has its turn, whatever the range and the stride."""

from __future__ import annotations

import numpy as np
import pytest

from kvmhost.bitmap import unpack
from kvmhost.errors import LayoutError
from kvmhost.trackers.sampling import Sampler, period_of, sample_mask


@pytest.mark.parametrize("period", [1, 2, 8, 30])
@pytest.mark.parametrize("n_pages", [1, 64, 1000, 65536])
def test_samples_take_every_page_once(period: int, n_pages: int) -> None:
    masks = [unpack(sample_mask(n_pages, period, turn), n_pages) for turn in range(period)]
    assert (np.sum(masks, axis=0) == 1).all()
    assert np.array_equal(sample_mask(n_pages, period, period), sample_mask(n_pages, period, 0))
    if n_pages == 65536:
        assert max(mask.sum() for mask in masks) < 2 * n_pages / period + 20


def test_a_stride_meets_every_turn_of_a_sample() -> None:
    for stride in (2, 8, 64):
        counts = [unpack(sample_mask(8192, 8, t), 8192)[::stride].sum() for t in range(8)]
        assert min(counts) > 8192 / stride / 8 / 3


def test_a_page_has_the_same_turn_in_every_range() -> None:
    whole = unpack(sample_mask(5000, 8, 3), 5000)
    assert np.array_equal(unpack(sample_mask(1000, 8, 3, gfn_start=777), 1000), whole[777:1777])


def test_neighbours_have_their_turn_together() -> None:
    mask = sample_mask(1 << 16, 8, 3)
    assert set(mask.tolist()) == {0, (1 << 64) - 1}


@pytest.mark.parametrize("period", [0, -1, 65537])
def test_no_sample_has_such_a_period(period: int) -> None:
    with pytest.raises(LayoutError, match=f"one page in {period}"):
        sample_mask(10, period, 0)


def test_fractions() -> None:
    assert [period_of(f) for f in (1, 0.5, 1 / 8, 0.3, 1 / 65536)] == [1, 2, 8, 3, 65536]
    for bad in (0.0, 1.1, -0.5, 1 / 70000):
        with pytest.raises(LayoutError, match="fraction"):
            period_of(bad)


def test_a_sampler_forgets_the_range_that_nobody_asks_for() -> None:
    sampler = Sampler()
    first = sampler.next_mask(0, 640, 0.5)
    for start in range(1, 400):
        sampler.next_mask(start, 640, 0.5)
    assert np.array_equal(sampler.next_mask(0, 640, 0.5), first)
    assert not np.array_equal(sampler.next_mask(0, 640, 0.5), first)
