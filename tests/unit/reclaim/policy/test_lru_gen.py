from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhost.bitmap import pack
from kvmhost.errors import LayoutError
from reclaim.policy.lru_gen import PROTECTED, LruGen


def mask(n, *gfns):
    bits = np.zeros(n, bool)
    bits[list(gfns)] = True
    return bits


def words(n, *gfns):
    return pack(mask(n, *gfns))


def everything(n):
    return np.ones(n, bool)


def test_a_new_policy_protects_everything_for_two_passes():
    policy = LruGen(8)
    assert policy.victims(8, everything(8), 0).size == 0
    policy.age(words(8, 0), 0)
    assert policy.victims(8, everything(8), 0).size == 0
    policy.age(words(8, 1), 0)
    # Page 0 was young one pass ago, page 1 in this one: both are protected.
    assert policy.victims(8, everything(8), 0).tolist() == [2, 3, 4, 5, 6, 7]


def test_victims_come_oldest_first_then_by_gfn():
    policy = LruGen(8)
    for young in ([5, 1], [6, 2], [7], [0]):
        policy.age(words(8, *young), 0)
    assert policy.sizes(everything(8)) == [(1, 4), (2, 2), (3, 1), (4, 1)]
    assert policy.victims(8, everything(8), 0).tolist() == [1, 3, 4, 5, 2, 6]
    assert policy.victims(3, everything(8), 0).tolist() == [1, 3, 4]
    assert policy.victims(5, everything(8), 0).tolist() == [1, 3, 4, 5, 2]
    assert policy.victims(8, mask(8, 6, 3), 0).tolist() == [3, 6]
    assert policy.victims(0, everything(8), 0).size == 0


def test_the_two_oldest_generations_become_one():
    policy = LruGen(4, n_generations=4)
    for _ in range(10):
        policy.age(words(4, 3), 0)
    assert (policy.min_seq, policy.max_seq) == (7, 10)
    assert policy.seq.tolist() == [7, 7, 7, 10]


def test_more_generations_tell_more_apart():
    policy = LruGen(6, n_generations=6)
    for page in range(6):
        policy.age(words(6, page), 0)
    assert policy.victims(6, everything(6), 0).tolist() == [0, 1, 2, 3]


def test_refaulted_pages_are_young():
    policy = LruGen(4)
    for _ in range(5):
        policy.age(words(4), 0)
    policy.refaulted(np.array([2]), 0)
    assert policy.victims(4, everything(4), 0).tolist() == [0, 1, 3]


def test_a_seed_shuffles_within_a_generation_only():
    def order(seed):
        policy = LruGen(64, seed=seed)
        policy.age(words(64, *range(32)), 0)
        policy.age(words(64), 0)
        policy.age(words(64), 0)
        return policy.victims(64, everything(64), 0).tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)[:32]) == list(range(32, 64))
    assert sorted(order(1)[32:]) == list(range(32))


@pytest.mark.parametrize("bad", [np.zeros(5, bool), np.zeros(4, np.uint8)])
def test_a_wrong_mask_is_refused(bad):
    policy = LruGen(4)
    for call in (policy.sizes, lambda m: policy.victims(1, m, 0)):
        with pytest.raises(LayoutError, match="need booleans for 4 pages"):
            call(bad)


@pytest.mark.parametrize(("pages", "generations"), [(4, 3), (0, 4), (-1, 4)])
def test_bad_sizes(pages, generations):
    with pytest.raises(LayoutError):
        LruGen(pages, generations)


@given(
    st.integers(4, 8),
    st.lists(st.sets(st.integers(0, 15)), min_size=1, max_size=20),
    st.sets(st.integers(0, 15)),
    st.integers(0, 20),
)
def test_against_a_plain_model(generations, harvests, candidates, n):
    """The model keeps, for each page, the last harvest that saw it."""
    policy = LruGen(16, generations)
    last = dict.fromkeys(range(16), 0)
    for number, young in enumerate(harvests, 1):
        policy.age(words(16, *young), 0)
        last |= dict.fromkeys(young, number)
    now = len(harvests)
    oldest = max(0, now - generations + 1)
    age = {page: max(seen, oldest) for page, seen in last.items()}
    eligible = sorted(
        (page for page in candidates if age[page] <= now - PROTECTED),
        key=lambda page: (age[page], page),
    )
    assert policy.victims(n, mask(16, *candidates), 0).tolist() == eligible[:n]
    assert sum(count for _, count in policy.sizes(everything(16))) == 16
