"""Classes of pages against a plain list of what each page's harvests told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhost.bitmap import n_words, pack, unpack
from kvmhost.reclaim.loss.clearing import ALL, ByClass, Clearing, PageClasses

N = 200
PAGES = st.sets(st.integers(0, N - 1))
#: By window: what the guest touches, and what the harvest at its end may clear; None: all.
WINDOWS = st.lists(st.tuples(PAGES, st.none() | PAGES), min_size=1, max_size=12)


def words(pages: set[int]) -> np.ndarray:
    bits = np.zeros(N, bool)
    bits[list(pages)] = True
    return pack(bits)


class Page:
    """One page: its bit, and what each harvest told that began with a clear bit."""

    def __init__(self) -> None:
        self.is_set = self.was_left = False
        self.known: list[bool] = []

    @property
    def steady(self) -> bool:
        return self.known[-2:] == [True, True]


@given(WINDOWS)
def test_classes_and_faults_are_those_of_each_page(windows):
    pages, classes = [Page() for _ in range(N)], PageClasses(N)
    for touched, mask in windows:
        faults, young, cleared = [0, 0], [0, 0], [0, 0]
        for i, page in enumerate(pages):
            page.is_set |= i in touched
            if not page.was_left:
                faults[not page.steady] += page.is_set
                page.known.append(page.is_set)
        set_now = {i for i, page in enumerate(pages) if page.is_set}
        for i, page in enumerate(pages):
            clears = mask is None or i in mask
            young[not page.steady] += page.is_set
            cleared[not page.steady] += page.is_set and clears
            page.was_left = page.is_set and not clears
            page.is_set = page.was_left
        facts = classes.note(words(set_now), None if mask is None else words(mask))
        assert facts.faults == ByClass(*faults)
        assert facts.young == ByClass(*young)
        assert facts.cleared == ByClass(*cleared)
        assert classes.n_steady == sum(page.steady for page in pages)


def test_all_pages_are_cleared_without_a_mask():
    assert PageClasses(N).mask(ALL) is None
    assert PageClasses(N).mask(Clearing(stretch=4.0)) is None


@pytest.mark.parametrize("share", [1 / 2, 1 / 3, 1 / 10, 1 / 64])
def test_every_page_has_its_turn_in_one_round_and_no_more_than_its_share_at_once(share):
    n_pages = 64 * 2000
    classes = PageClasses(n_pages)
    turns = np.zeros(n_pages, int)
    rounds = round(1 / share)
    for _ in range(rounds):
        mask = classes.mask(Clearing(steady=1.0, changing=share))
        bits = unpack(mask, n_pages)
        assert bits.mean() == pytest.approx(share, rel=0.2)
        turns += bits
    # Turns wrap around at a boundary that rounding moves by a group at most.
    assert np.mean(turns == 1) > 0.99
    assert turns.min() >= 0


def test_steady_pages_and_others_take_turns_by_shares_of_their_own():
    classes, hot = PageClasses(N), set(range(64, 128))
    for _ in range(2):
        classes.note(words(hot), None)
    assert classes.n_steady == 64
    mask = unpack(classes.mask(Clearing(steady=1e-6, changing=1.0)), N)
    assert not mask[64:128].any()
    assert mask[:64].all()
    assert mask[128:].all()


def test_pages_of_a_group_take_turns_together():
    mask = PageClasses(64 * 50).mask(Clearing(changing=0.3))
    assert set(mask.tolist()) <= {0, 2**64 - 1}
    assert 0 < np.count_nonzero(mask) < mask.size == n_words(64 * 50)


@pytest.mark.parametrize(
    ("clearing", "passes"),
    [
        (ALL, 1),
        (Clearing(stretch=3.0), 3),
        (Clearing(1 / 8, 1 / 2), 8),
        (Clearing(1 / 8, 1, 2), 16),
    ],
)
def test_staleness_is_a_round_of_the_smaller_share(clearing, passes):
    assert clearing.stale_passes == passes
