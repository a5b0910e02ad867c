from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhost.bitmap import pack, unpack
from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy.lru_gen import PROTECTED, Caps, LruGen
from kvmhost.reclaim.policy.lru_gen_filter import look_around_windows, should_look_around

MS = 1_000_000


def passes(policy, pages, *windows):
    for young in windows:
        policy.age(pages.words(policy.n_pages, young), 0)


def test_a_new_policy_protects_everything_for_two_passes(pages):
    policy = LruGen(8, seed=None)
    assert policy.victims(8, pages.everything(8), 0).size == 0
    passes(policy, pages, [0])
    assert policy.victims(8, pages.everything(8), 0).size == 0
    passes(policy, pages, [1])
    # There are three generations so far, and who was seen once is in the third.
    assert policy.victims(8, pages.everything(8), 0).size == 8
    passes(policy, pages, [2])
    assert policy.victims(8, pages.everything(8), 0).tolist() == [0, 1, 3, 4, 5, 6, 7, 2]


def test_seen_twice_is_protected_seen_once_is_not(pages):
    policy = LruGen(8, seed=None)
    passes(policy, pages, [1], [1], [1, 2])
    assert policy.seq.tolist() == [0, 3, 1, 0, 0, 0, 0, 0]
    assert policy.victims(8, pages.everything(8), 0).tolist() == [0, 3, 4, 5, 6, 7, 2]
    # Page 1 stays protected for two generations, then it may go.
    passes(policy, pages, [], [])
    assert 1 in policy.victims(8, pages.everything(8), 0).tolist()


def test_no_more_is_protected_than_its_share(pages):
    policy = LruGen(8)
    for _ in range(6):
        passes(policy, pages, range(6))
    # Six pages would be three quarters: none is protected, the two that were never seen go first.
    assert sorted(policy.victims(2, pages.everything(8), 0).tolist()) == [6, 7]
    assert policy.victims(8, pages.everything(8), 0).size == 8


def test_the_two_oldest_generations_become_one(pages):
    policy = LruGen(4, n_generations=4)
    passes(policy, pages, *[[3]] * 10)
    assert (policy.min_seq, policy.max_seq) == (7, 10)
    assert policy.seq.tolist() == [7, 7, 7, 10]
    assert sorted(policy.births_ns) == [7, 8, 9, 10]
    assert policy.sizes(pages.everything(4)) == [(7, 3), (8, 0), (9, 0), (10, 1)]


def test_equals_go_by_blocks_and_a_seed_changes_their_order(pages):
    def order(seed):
        policy = LruGen(4096, seed=seed)
        passes(policy, pages, [], [], [])
        return policy.victims(4096, pages.everything(4096), 0).tolist()

    assert order(1) == order(1) != order(2)
    assert order(None) == list(range(4096))
    blocks = [gfn // 64 for gfn in order(1)]
    assert sum(a != b for a, b in itertools.pairwise(blocks)) == 63


def test_min_ttl_keeps_what_was_seen_lately(pages):
    policy = LruGen(4, n_generations=8, min_ttl_ms=2500, seed=None)
    for second in range(1, 7):
        policy.age(pages.words(4, [second - 1] if second <= 4 else []), second * 1000 * MS)
    now = 6000 * MS
    # Pages 0 to 3 were seen in the windows that ended at 1, 2, 3 and 4 s.
    assert policy.victims(4, pages.everything(4), now).tolist() == [0, 1, 2]
    assert policy.victims(4, pages.everything(4), now + 500 * MS).tolist() == [0, 1, 2, 3]


def test_a_tier_that_refaults_more_is_protected(pages):
    n = 1024
    policy = LruGen(n, seed=None)
    often, never = range(512), range(512, 1024)
    passes(policy, pages, [], [], [])
    for _ in range(8):
        # Seen often, then idle for three windows, gone, and back every time.
        passes(policy, pages, often, often, [], [], [])
        gone = policy.victims(256, pages.mask(n, often), 0)
        policy.evicted(gone, 0)
        policy.refaulted(gone, 0)
        cold = pages.array(never)
        policy.evicted(cold, 0)
    counters = policy.counters()
    assert counters["last_evictable_tier"] < policy.explain(0)["tier"] == 3
    assert counters["tier0_refaulted"] == 0
    passes(policy, pages, [], [], [])
    assert set(policy.victims(512, pages.everything(n), 0).tolist()) == set(never)


@pytest.mark.parametrize(("generations", "counted"), [(0, 64), (31, 64), (32, 0), (300, 0)])
def test_only_a_return_within_32_generations_counts_against_the_eviction(
    pages, generations, counted
):
    policy = LruGen(4096, seed=None)
    passes(policy, pages, [], [], [])
    gone = policy.victims(64, pages.everything(4096), 0)
    policy.evicted(gone, 0)
    passes(policy, pages, *[[]] * generations)
    policy.refaulted(gone, 0)
    counters = policy.counters()
    assert counters["tier0_refaulted"] == counted
    assert counters["refaulted"] == 64


def test_a_page_is_counted_as_evicted_or_as_protected_but_not_as_both(pages):
    n = 1024
    policy = LruGen(n, seed=None)
    often = range(512)
    passes(policy, pages, [], [], [])
    for _ in range(8):
        passes(policy, pages, often, often, [], [], [])
        gone = policy.victims(256, pages.mask(n, often), 0)
        policy.evicted(gone, 0)
        policy.refaulted(gone, 0)
        policy.evicted(pages.array(range(512, n)), 0)
    passes(policy, pages, [], [], [])
    # All pages that no tier protects are evicted, and 100 of those that one does.
    assert policy.counters()["last_evictable_tier"] < policy.explain(0)["tier"]

    def counted():
        return sum(policy.counters()[f"tier{tier}_total"] for tier in range(5))

    before = counted()
    gone = policy.victims(512 + 100, pages.everything(n), 0)
    evicted = np.sort(gone[gone < 512])
    assert evicted.tolist() == list(range(256, 356))
    policy.evicted(gone, 0)
    # The first 256 pages, which refaulted, are in a younger generation: not passed over.
    assert counted() - before == 512 + 256


# -- probing and the filter ----------------------------------------------------


def test_a_victim_found_young_stays_and_its_64_are_looked_at(pages, bits):
    policy = LruGen(256, seed=None, probes=True)
    passes(policy, pages, [], [], [])
    probe = bits(256, young=[3, 10, 40, 70])
    got = policy.victims(4, pages.everything(256), 0, probe).tolist()
    assert probe.asked[0] == {0, 1, 2, 3}
    assert probe.asked[1] == set(range(64)) - {0, 1, 2, 3}
    # Their order is by windows seen from two on: young once is young, but not spared.
    assert got == [0, 1, 2, 4]
    assert policy.counters()["probed_young"] == 3
    assert policy.counters()["looked_around"] == 2
    assert probe.young == {70}


def test_without_spte_walk_victims_are_tested_one_by_one(pages, bits):
    policy = LruGen(256, seed=None, probes=True, caps=Caps.ALL & ~Caps.SPTE_WALK)
    passes(policy, pages, [], [], [])
    assert not policy.plan().batched
    probe = bits(256, young=[1, 10])
    assert policy.victims(3, pages.everything(256), 0, probe).tolist() == [0, 2, 3]
    assert (probe.single, probe.asked) == ([0, 1, 2, 3], [])


def test_sparse_tables_are_not_swept_until_eviction_finds_them_dense(pages, bits):
    n = 4 * 512
    policy = LruGen(n, seed=None, probes=True)
    assert policy.plan().pages is None
    dense, sparse = range(512, 1024, 8), [5, 1500]
    passes(policy, pages, [*dense, *sparse])

    def swept():
        plan = policy.plan()
        return unpack(plan.pages, n).reshape(4, 512)

    assert (
        swept().all(axis=1).tolist() == swept().any(axis=1).tolist() == [False, True, False, False]
    )
    passes(policy, pages, dense)
    policy.plan()
    passes(policy, pages, dense)
    # One young page in eight of those looked around at lets table 3 in.
    probe = bits(n, young=range(1536, 1600, 8))
    policy.victims(1, pages.mask(n, range(1536, n)), 0, probe)
    assert swept().all(axis=1).tolist() == [False, True, False, True]


def test_a_plan_ends_with_the_last_page(pages):
    """The last table has 70 pages, the last word 6."""
    n = 2 * 512 + 70
    policy = LruGen(n, seed=None, probes=True)
    policy.plan()
    passes(policy, pages, range(1024, n))
    assert np.array_equal(policy.plan().pages, pages.words(n, range(1024, n)))


def test_capabilities(pages):
    policy = LruGen(1024, probes=True, caps=0x1 | 0x8)
    assert not policy.plan().pages.any()
    policy.caps = 0x7
    assert policy.plan().pages is None
    assert not policy.plan().batched
    young_tables = np.array([0b10], dtype=np.uint64)
    assert unpack(policy.plan(young_tables).pages, 1024).tolist() == [False] * 512 + [True] * 512
    policy.caps = 0x3
    assert policy.plan(young_tables).pages is None
    assert policy.full_plan().pages is None
    policy.caps = 0
    passes(policy, pages, [1], [1], [1])
    assert policy.max_seq == 0
    assert policy.victims(9, pages.everything(1024), 0).size == 0
    for bad in (0x10, -1):
        with pytest.raises(LayoutError, match="need a mask of bits in 0xf"):
            policy.caps = bad


def test_explain(pages):
    policy = LruGen(8)
    passes(policy, pages, [1], [1], [])
    assert policy.explain(1) == {
        "windows": "0110000000000000",
        "tier": 2,
        "seq": 2,
        "protected": "yes",
    }
    policy.evicted(np.array([1]), 0)
    passes(policy, pages, [])
    told = policy.explain(1)
    assert (told["generations_since_eviction"], told["tier_at_eviction"]) == (1, 2)
    with pytest.raises(LayoutError, match="gfn 0x8 outside"):
        policy.explain(8)


def test_bad_input(pages):
    policy = LruGen(4)
    for bad in (np.zeros(5, bool), np.zeros(4, np.uint8)):
        for call in (policy.sizes, lambda m: policy.victims(1, m, 0)):
            with pytest.raises(LayoutError, match="need booleans for 4 pages"):
                call(bad)
    with pytest.raises(LayoutError, match="need 1 64-bit words"):
        policy.age(np.zeros(2, np.uint64), 0)
    for n, generations in ((4, 3), (0, 4), (-1, 4), (4, 129)):
        with pytest.raises(LayoutError):
            LruGen(n, generations)


def test_state_takes_four_bytes_a_page():
    policy = LruGen(1 << 18)
    arrays = [v for v in vars(policy).values() if isinstance(v, np.ndarray)]
    assert sum(a.nbytes for a in arrays) <= 4.1 * (1 << 18)


# -- against a model that keeps a record a page ---------------------------------


class Model:
    """The rules, a page at a time."""

    def __init__(self, n, generations):
        self.generations, self.max_seq, self.share = generations, 0, 0.5
        self.behind = dict.fromkeys(range(n), 0)
        self.windows = {page: [] for page in range(n)}
        self.out = set()

    def refs(self, page):
        return sum(self.windows[page][:16])

    def age(self, young):
        self.max_seq += 1
        for page, windows in self.windows.items():
            self.behind[page] = min(self.behind[page] + 1, 255)
            windows.insert(0, page in young)
        room = int((len(self.windows) - len(self.out)) * self.share)
        enough = 2
        while enough < 17 and sum(self.refs(p) >= enough for p in young) > room:
            enough += 1
        open_behind = min(self.max_seq, self.generations - 1)
        for page in young:
            if self.refs(page) >= enough:
                self.behind[page] = 0
            else:
                self.behind[page] = min(self.behind[page], 2, open_behind)

    def evict(self, gfns):
        self.out |= set(gfns)
        self.behind |= dict.fromkeys(gfns, 0)

    def come_in(self, gfns):
        self.out -= set(gfns)
        for page in gfns:
            self.behind[page] = 255

    def victims(self, n, candidates):
        oldest = min(self.max_seq, self.generations - 1)
        able = [p for p in candidates if self.behind[p] >= PROTECTED and oldest >= PROTECTED]
        able.sort(key=lambda p: (-min(self.behind[p], oldest), max(self.refs(p), 2), p))
        if n:
            short = len(able) < n <= len(candidates) / 2
            self.share = max(self.share / 2, 1 / 64) if short else min(self.share * 1.05, 0.5)
        return able[:n]


@settings(deadline=None)
@given(
    st.integers(4, 8),
    st.lists(
        st.tuples(st.sets(st.integers(0, 15)), st.integers(0, 6), st.sets(st.integers(0, 15))),
        min_size=1,
        max_size=25,
    ),
)
def test_against_a_plain_model(generations, steps):
    """Too few pages for tiers to be protected: order and protection alone."""
    policy, model = LruGen(16, generations, seed=None), Model(16, generations)
    for number, (young, n, candidates) in enumerate(steps):
        mask = np.zeros(16, bool)
        mask[list(young)] = True
        back = np.array(sorted(young & model.out), dtype=np.int64)
        if number:
            policy.refaulted(back, 0)
            model.come_in(back.tolist())
        policy.age(pack(mask), number)
        model.age(young)
        asked = np.zeros(16, bool)
        asked[list(candidates - model.out)] = True
        got = policy.victims(n, asked, number)
        assert got.tolist() == model.victims(n, candidates - model.out)
        policy.evicted(got, number)
        model.evict(got.tolist())
        assert sum(count for _, count in policy.sizes(np.ones(16, bool))) == 16
        assert policy.behind.tolist() == [model.behind[p] for p in range(16)]


@settings(deadline=None)
@given(st.integers(0, (1 << 16) - 1))
def test_tier_is_the_rounded_logarithm_of_the_windows(history):
    from kvmhost.reclaim.policy.lru_gen_tiers import TIER_OF

    refs = bin(history).count("1")
    assert TIER_OF[history] == min(math.ceil(math.log2(refs + 1)), 4)


def test_the_nth_lowest_key_is_that_of_a_sort():
    from kvmhost.reclaim.policy.lru_gen import _nth_lowest

    chance = np.random.default_rng(3)
    for _ in range(500):
        top = int(chance.choice([3, 70000, 1 << 32]))
        keys = chance.integers(0, top, chance.integers(1, 200), dtype=np.uint32)
        n = int(chance.integers(1, keys.size + 1))
        assert _nth_lowest(keys, n) == np.sort(keys)[n - 1]


def _window(gfn, area_start, area_end):
    """The statements of lru_gen_look_around() in mm/vmscan.c, one page at a time."""
    start, end = max(gfn & ~511, area_start), min(gfn | 511, area_end - 1) + 1
    if end - start == 1:
        return None
    if end - start > 64:
        if gfn - start < 32:
            end = start + 64
        elif end - gfn < 32:
            start = end - 64
        else:
            start, end = gfn - 32, gfn + 32
    return start, end


@pytest.mark.parametrize(
    "area", [(0, 2048), (100, 101), (100, 163), (100, 164), (100, 166), (500, 1100), (511, 513)]
)
def test_the_window_of_look_around_is_that_of_the_kernel(area):
    gfns = np.arange(*area, dtype=np.int64)
    starts, ends = look_around_windows(gfns, *area)
    for gfn, start, end in zip(gfns.tolist(), starts.tolist(), ends.tolist(), strict=True):
        expected = _window(gfn, *area)
        assert (start, end) == expected if expected else start == end, gfn


def test_windows_are_centred_on_their_victims_and_asked_for_at_once(pages, bits):
    policy = LruGen(2048, probes=True, seed=None)
    passes(policy, pages, [], [], [])
    probe = bits(2048, young=[600, 900, 567, 570, 631, 632])
    policy.victims(2, pages.mask(2048, [600, 900]), 0, probe)
    assert probe.asked[0] == {600, 900}
    assert probe.asked[1] == {*range(568, 632), *range(868, 932)} - {600, 900}
    assert policy.counters()["looked_around"] == 2
    assert probe.young == {567, 632}


def test_what_starts_a_look_around():
    assert should_look_around(True, True)
    assert not should_look_around(True, False)
    assert not should_look_around(False, True)
