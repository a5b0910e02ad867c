"""Views: each reader of one source gets what it would get alone, whatever the others do.

The model shares no code with the views: it keeps, for each reader, the set of pages touched
since that reader last cleared them. The source has one accessed bit per page, and, as some
trackers, leaves of 512 pages that are cleared as a whole.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhost.bitmap import Provenance, YoungBitmap, pack, unpack
from kvmhost.errors import InUseError
from kvmhost.trackers.sampling import sample_mask
from kvmhost.trackers.sharing import SharedHarvests
from kvmhost.trackers.views import MAX_VIEWS, View, ViewKey, Views
from kvmhost.vm.harvest import HarvestRequest

N_PAGES = 1500
LEAF = 512
UNNAMED = ViewKey(0, "default")


class OneBitSource:
    """A source with one accessed bit per page.

    :param huge: first pages of leaves that have one bit for all their pages
    """

    name = "one-bit"

    def __init__(self, n_pages: int = N_PAGES, huge: tuple[int, ...] = ()) -> None:
        self.young = np.zeros(n_pages, dtype=bool)
        self.armed = np.ones(n_pages, dtype=bool)
        self.huge = huge
        self.now_ns = 1
        self.faults = 0

    def touch(self, pages: list[int]) -> None:
        for page in pages:
            if self.armed[page]:
                self.young[self._leaf(page)] = True
                self.faults += 1
                self.armed[self._leaf(page)] = False

    def harvest(self, gfn_start, n_pages, clear=True, mask=None):
        here = slice(gfn_start, gfn_start + n_pages)
        words = pack(self.young[here])
        coarse = np.zeros(self.young.size, dtype=bool)
        for first in self.huge:
            coarse[first : first + LEAF] = True
        coarse_words = pack(coarse[here] & self.young[here])
        if clear:
            chosen = np.ones(n_pages, dtype=bool) if mask is None else unpack(mask, n_pages)
            for page in np.flatnonzero(chosen & self.young[here]) + gfn_start:
                self.young[self._leaf(int(page))] = False
        self.now_ns += 10
        source = Provenance(self.name, "bits", 1, self.now_ns)
        return YoungBitmap(
            gfn_start, n_pages, words, coarse_words if coarse_words.any() else None, source
        )

    def rearm(self, gfn_start, n_pages, young=None):
        gfns = range(gfn_start, gfn_start + n_pages) if young is None else young.gfns().tolist()
        for page in gfns:
            self.armed[self._leaf(page)] = True

    def _leaf(self, page: int) -> slice:
        first = page // LEAF * LEAF
        return slice(first, first + LEAF) if first in self.huge else slice(page, page + 1)


class Rig:
    """A source, its shared harvests, and the model of what each reader should get."""

    def __init__(self, huge: tuple[int, ...] = ()) -> None:
        self.source = OneBitSource(huge=huge)
        self.noted: list[YoungBitmap] = []
        self.shared = SharedHarvests(N_PAGES, self.noted.append)
        self.model: dict[ViewKey, set[int]] = {UNNAMED: set()}
        self.turns: dict[tuple[ViewKey, int, int], int] = {}

    def touch(self, pages: list[int]) -> None:
        self.source.touch(pages)
        for touched in self.model.values():
            for page in pages:
                leaf = self.source._leaf(page)
                touched.update(range(leaf.start, leaf.stop))

    def harvest(self, key: ViewKey, **arguments) -> tuple[YoungBitmap, set[int]]:
        """Harvest; return the result and what the model expects."""
        asked = HarvestRequest(**arguments).within(N_PAGES)
        young = self.shared.harvest(self.source, key, asked).young
        pages = set(range(asked.gfn_start, asked.gfn_start + asked.count))
        touched = self.model.setdefault(key, set())
        expected = touched & pages
        if asked.clear:
            mask = pages if asked.mask is None else pages & self._masked(asked)
            if asked.rearm == "sample":
                mask &= self._sampled(key, asked)
            touched -= mask
        return young, expected

    def close(self, key: ViewKey) -> None:
        self.shared.views.close(key)
        self.model.pop(key, None)

    @staticmethod
    def _masked(asked: HarvestRequest) -> set[int]:
        return set((np.flatnonzero(unpack(asked.mask, asked.count)) + asked.gfn_start).tolist())

    def _sampled(self, key: ViewKey, asked: HarvestRequest) -> set[int]:
        place = (key, asked.gfn_start, asked.count)
        turn = self.turns[place] = self.turns.get(place, -1) + 1
        mask = sample_mask(asked.count, round(1 / asked.fraction), turn, asked.gfn_start)
        return set((np.flatnonzero(unpack(mask, asked.count)) + asked.gfn_start).tolist())


READERS = [UNNAMED, ViewKey(7, "a"), ViewKey(8, "a"), ViewKey(8, "b")]


@st.composite
def schedules(draw):
    """Draw touches, harvests of all kinds, and readers that come and go."""
    steps = []
    for _ in range(draw(st.integers(1, 40))):
        kind = draw(st.sampled_from(["touch", "touch", "harvest", "harvest", "harvest", "close"]))
        if kind == "touch":
            steps.append((kind, draw(st.lists(st.integers(0, N_PAGES - 1), max_size=12))))
        elif kind == "close":
            steps.append((kind, draw(st.sampled_from(READERS[1:]))))
        else:
            start = draw(st.sampled_from([0, 0, 1, 64, 500, 777]))
            count = draw(st.sampled_from([None, None, 0, 1, 65, 700]))
            arguments = {"gfn_start": start, "n_pages": count}
            arguments["clear"] = draw(st.sampled_from([True, True, False]))
            arguments["rearm"] = draw(st.sampled_from(["young", "young", "all", "sample"]))
            if arguments["rearm"] == "sample":
                arguments["fraction"] = draw(st.sampled_from([0.5, 0.25]))
            if draw(st.booleans()):
                n = N_PAGES - start if count is None else count
                rng = np.random.default_rng(draw(st.integers(0, 1000)))
                arguments["mask"] = pack(rng.random(n) < 0.5)
            steps.append((kind, (draw(st.sampled_from(READERS)), arguments)))
    return steps


@settings(max_examples=100, deadline=None)
@given(schedules(), st.sampled_from([(), (512,), (0, 512)]))
def test_each_reader_gets_what_it_would_get_alone(steps, huge) -> None:
    rig = Rig(huge)
    for kind, what in steps:
        if kind == "touch":
            rig.touch(what)
        elif kind == "close":
            rig.close(what)
        else:
            key, arguments = what
            young, expected = rig.harvest(key, **arguments)
            assert set(young) == expected


A, B = READERS[1], READERS[3]


def test_a_new_view_begins_with_the_sweep_that_opens_it() -> None:
    rig = Rig()
    rig.touch([1, 2])
    young, _ = rig.harvest(A)
    assert not young
    assert young.provenance.window_start_ns == young.provenance.window_end_ns
    rig.touch([3])
    assert list(rig.harvest(A)[0]) == [3]
    assert list(rig.harvest(UNNAMED)[0]) == [1, 2, 3]


def test_a_reader_that_does_not_rearm_hides_no_touch_from_others() -> None:
    rig = Rig()
    rig.harvest(B)
    for page in range(3):
        rig.touch([page])
        rig.harvest(A, rearm="none")
        rig.touch([page])
        assert list(rig.harvest(B)[0]) == [page]


def test_a_lone_reader_may_leave_pages_unarmed() -> None:
    rig = Rig()
    rig.harvest(A)
    rig.touch([5])
    assert list(rig.harvest(A, rearm="none")[0]) == [5]
    rig.touch([5])
    assert not rig.harvest(A, rearm="none")[0]
    assert rig.source.faults == 1


def test_readers_at_the_same_time_rearm_a_page_once() -> None:
    rig = Rig()
    for key in READERS:
        rig.harvest(key)
    for _ in range(10):
        rig.touch(list(range(100)))
        for key in READERS:
            assert len(rig.harvest(key)[0]) == 100
    assert rig.source.faults == 1000
    assert rig.shared.n_cleared == 1000


@settings(deadline=None)
@given(schedules())
def test_a_fault_that_a_sweep_caused_is_counted_once(steps) -> None:
    """Whoever cleared the page, whoever found it young again, and in however many sweeps."""
    rig, touched = Rig(), set()
    for kind, what in steps:
        if kind == "touch":
            rig.touch(what)
            touched |= set(what)
        elif kind == "close":
            rig.close(what)
        elif what[1]["rearm"] != "all":
            rig.harvest(what[0], **what[1])
    rig.shared.sweep_all(rig.source)
    # The first touch of each page was a fault without any sweep.
    assert rig.shared.n_retouched == rig.source.faults - len(touched)


def test_another_tracker_starts_without_pages_that_were_cleared() -> None:
    rig = Rig()
    rig.touch([5])
    rig.harvest(A)
    rig.shared.note_tracker(A)
    rig.touch([5])
    rig.harvest(A)
    assert rig.shared.n_retouched == 0


def test_the_pager_is_told_of_each_sweep_once() -> None:
    rig = Rig()
    for key in (A, B):
        rig.harvest(key)
    rig.touch([9, 10])
    for key in (A, B):
        rig.harvest(key)
    assert [young.gfns().tolist() for young in rig.noted if young] == [[9, 10]]


def test_a_look_tells_the_pager_nothing() -> None:
    rig = Rig()
    rig.touch([9])
    assert list(rig.harvest(UNNAMED, clear=False)[0]) == [9]
    assert rig.noted == []
    assert rig.shared.sweeps == 0


def test_a_page_is_coarse_unless_a_sweep_of_the_window_saw_it_exactly() -> None:
    view = View(A, 256, 0)
    every = YoungBitmap.from_gfns(0, 256, range(64))
    view.add(YoungBitmap.from_gfns(0, 256, [3, 70]))
    view.add(dataclasses.replace(every, coarse=every.words))
    view.add(YoungBitmap.from_gfns(0, 256, [5]))
    test = YoungBitmap.from_gfns(0, 256, [200, 7])
    merged = view.merged(dataclasses.replace(test, coarse=test.words))
    assert set(merged) == {*range(64), 70, 200}
    assert set(np.flatnonzero(merged.coarse_as_bool())) == {*range(64), 200} - {3, 5}
    view.take(0, 64, None, 1)
    assert view.merged(YoungBitmap.from_gfns(0, 256, [])).coarse is None


def test_windows_belong_to_the_view_and_to_the_part_of_memory() -> None:
    rig = Rig()
    opened = rig.harvest(A)[0].provenance.window_end_ns
    first = rig.harvest(A, gfn_start=0, n_pages=512)[0].provenance
    rig.harvest(UNNAMED)
    rig.harvest(A, gfn_start=0, n_pages=512, clear=False)
    second = rig.harvest(A, gfn_start=0, n_pages=1024)[0].provenance
    third = rig.harvest(A, gfn_start=0, n_pages=512)[0].provenance
    assert (first.window_start_ns, second.window_start_ns) == (opened, opened)
    assert third.window_start_ns == second.window_end_ns


def test_a_view_of_many_parts_has_windows_that_begin_too_early_not_too_late() -> None:
    view = View(A, 1 << 16, 5)
    view.take(0, 1 << 16, None, 7)
    for at in range(200):
        view.take(at * 100, 50, None, 1000 + at)
    assert view.started_ns(0, 1 << 16) == 7
    assert all(view.started_ns(at * 100, 50) <= 1000 + at for at in range(200))
    assert view.started_ns(199 * 100, 50) == 1199


def test_one_view_too_many_is_refused_with_the_names_of_the_others() -> None:
    rig = Rig()
    for number in range(MAX_VIEWS):
        rig.harvest(ViewKey(100 + number, "record"))
    with pytest.raises(InUseError, match=r"16 of a VM.*record \(process 100\)"):
        rig.harvest(ViewKey(1, "watch"))
    rig.harvest(UNNAMED)
    rig.harvest(ViewKey(105, "record"))
    rig.close(ViewKey(105, "record"))
    rig.harvest(ViewKey(1, "watch"))


def test_the_unnamed_view_cannot_be_closed() -> None:
    views = Views(64, 0)
    assert not views.close(UNNAMED)
    assert views.get(UNNAMED) is not None


def test_the_state_of_views() -> None:
    rig = Rig()
    rig.harvest(A)
    rig.touch([1, 2, 3])
    rig.harvest(UNNAMED)
    unnamed, named = rig.shared.views.list()
    assert (unnamed.key, unnamed.n_young, unnamed.harvests) == (UNNAMED, 0, 1)
    assert (named.key, named.n_young, named.harvests) == (A, 3, 0)
    assert named.window_start_ns < unnamed.window_start_ns


# -- windows that end with another reader's sweep ------------------------------------


@pytest.fixture
def recent(monkeypatch) -> Rig:
    """Return a rig whose clock is that of its source."""
    rig = Rig()
    monkeypatch.setattr("time.monotonic_ns", lambda: rig.source.now_ns)
    rig.harvest(A)
    rig.harvest(B)
    return rig


def test_a_reader_may_end_its_window_with_the_sweep_of_another(recent: Rig) -> None:
    recent.touch([1])
    swept = recent.harvest(A)[0].provenance.window_end_ns
    recent.touch([2])
    sweeps = recent.shared.sweeps
    young, _ = recent.harvest(B, max_age_s=1)
    assert list(young) == [1]
    assert young.provenance.window_end_ns == swept
    assert recent.shared.sweeps == sweeps
    young, _ = recent.harvest(B, max_age_s=1)
    assert list(young) == [2]
    assert young.provenance.window_start_ns == swept


def test_a_mask_takes_its_part_of_the_sweep_of_another(recent: Rig) -> None:
    recent.touch([1, 2])
    recent.harvest(A)
    mask = YoungBitmap.from_gfns(0, N_PAGES, [1]).words
    assert list(recent.harvest(B, max_age_s=1, mask=mask)[0]) == [1, 2]
    assert list(recent.harvest(B)[0]) == [2]


@pytest.mark.parametrize(
    "other", [{"mask": pack(np.ones(N_PAGES, dtype=bool))}, {"n_pages": 512}, {"clear": False}]
)
def test_only_a_sweep_of_all_pages_of_the_range_ends_a_window(recent: Rig, other) -> None:
    recent.touch([1])
    recent.harvest(A, **other)
    recent.touch([2])
    assert list(recent.harvest(B, max_age_s=1)[0]) == [1, 2]


@pytest.mark.parametrize("asked", [{"max_age_s": 1e-9}, {}, {"max_age_s": 1, "rearm": "all"}])
def test_an_older_sweep_does_not_end_a_window(recent: Rig, asked) -> None:
    recent.touch([1])
    recent.harvest(A)
    recent.source.now_ns += 100
    recent.touch([2])
    assert list(recent.harvest(B, **asked)[0]) == [1, 2]


def test_another_tracker_begins_a_window_for_who_asked_for_it(recent: Rig) -> None:
    rig = recent
    rig.touch([1])
    rig.shared.sweep_all(rig.source)
    rig.shared.note_tracker(A)
    rig.source.name = "another"
    rig.touch([2])
    asked = HarvestRequest().within(N_PAGES)
    own = rig.shared.harvest(rig.source, A, asked).young
    others = rig.shared.harvest(rig.source, B, asked).young
    assert (list(own), own.provenance.tracker) == ([2], "another")
    assert (list(others), others.provenance.tracker) == ([1, 2], "mixed")
    assert rig.shared.harvest(rig.source, B, asked).young.provenance.tracker == "another"
