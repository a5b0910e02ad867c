"""A YoungBitmap is the set of its young gfns: compared with Python's sets."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.errors import LayoutError

OPERATORS = {"and": operator.and_, "or": operator.or_, "xor": operator.xor, "sub": operator.sub}

Parts = tuple[int, int, set[int], set[int]]


@st.composite
def parts(draw: st.DrawFn) -> tuple[int, int, list[tuple[set[int], set[int] | None]]]:
    """A range, and the young and coarse gfns of two bitmaps of it."""
    start, n_pages = draw(st.integers(0, 1 << 40)), draw(st.integers(0, 300))
    offsets = st.sets(st.integers(0, n_pages - 1)) if n_pages else st.just(set())
    bitmaps = []
    for _ in range(2):
        young = {start + offset for offset in draw(offsets)}
        coarse = draw(st.none() | offsets)
        marked = None if coarse is None else young & {start + offset for offset in coarse}
        bitmaps.append((young, marked))
    return start, n_pages, bitmaps


def make(start: int, n_pages: int, young: set[int], coarse: set[int] | None) -> YoungBitmap:
    marked = None
    if coarse is not None:
        marked = YoungBitmap.from_gfns(start, n_pages, sorted(coarse)).words
    return YoungBitmap.from_gfns(start, n_pages, sorted(young), coarse=marked)


def coarse_gfns(bitmap: YoungBitmap) -> set[int]:
    return set((np.flatnonzero(bitmap.coarse_as_bool()) + bitmap.gfn_start).tolist())


@given(parts())
def test_size_members_order_and_truth_are_those_of_the_set(given_parts) -> None:
    start, n_pages, [(young, coarse), _] = given_parts
    bitmap = make(start, n_pages, young, coarse)
    assert list(bitmap) == sorted(young)
    assert all(type(gfn) is int for gfn in bitmap)
    assert (len(bitmap), bool(bitmap)) == (len(young), bool(young))
    around = range(max(0, start - 2), start + n_pages + 2)
    assert {gfn for gfn in around if gfn in bitmap} == young
    assert {gfn for gfn in around if np.int64(gfn) in bitmap} == young
    assert None not in bitmap
    assert np.asarray(bitmap).tolist() == [start + i in young for i in range(n_pages)]


@given(parts(), st.sampled_from(sorted(OPERATORS)))
def test_operators_are_those_of_sets(given_parts, name: str) -> None:
    start, n_pages, two = given_parts
    a, b = (make(start, n_pages, *part) for part in two)
    found = OPERATORS[name](a, b)
    assert set(found) == OPERATORS[name](set(a), set(b))
    assert (found.gfn_start, found.n_pages) == (start, n_pages)
    # What the page itself was seen to do in a bitmap, as far as it counts for the result.
    (young_a, _), (young_b, _) = two
    exact_a, exact_b = young_a - coarse_gfns(a), young_b - coarse_gfns(b)
    exact = {
        "and": exact_a & exact_b,
        "or": exact_a | exact_b,
        "xor": (exact_a - young_b) | (exact_b - young_a),
        "sub": exact_a - young_b,
    }[name]
    assert set(found) - coarse_gfns(found) == exact
    assert coarse_gfns(found) <= set(found)
    assert (found.coarse is None) == (a.coarse is None and b.coarse is None)


@given(parts())
def test_the_rest_of_the_range(given_parts) -> None:
    start, n_pages, [(young, coarse), _] = given_parts
    bitmap = make(start, n_pages, young, coarse)
    assert set(~bitmap) == set(range(start, start + n_pages)) - young
    assert (~bitmap).coarse is None
    assert ~~bitmap == bitmap
    assert len(bitmap) + len(~bitmap) == n_pages


@given(parts(), st.none() | st.integers(-320, 320), st.none() | st.integers(-320, 320))
def test_slices_are_those_of_the_range(given_parts, first: int | None, end: int | None) -> None:
    start, n_pages, [(young, coarse), _] = given_parts
    bitmap = make(start, n_pages, young, coarse)
    gfns = range(start, start + n_pages)[first:end]
    part = bitmap[first:end]
    assert set(part) == young & set(gfns)
    assert part.n_pages == len(gfns)
    assert part.gfn_start == gfns.start
    assert coarse_gfns(part) == (coarse or set()) & set(gfns)
    part.words[:] = 0  # a copy
    assert set(bitmap) == young


@given(parts(), parts())
def test_equal_means_same_range_and_same_pages(one, other) -> None:
    a = make(one[0], one[1], *one[2][0])
    b = make(other[0], other[1], *other[2][0])
    same = one[:2] == other[:2] and set(a) == set(b)
    assert (a == b) is same
    assert a == make(one[0], one[1], one[2][0][0], None)
    assert a != set(a)


@pytest.mark.parametrize("name", sorted(OPERATORS))
@pytest.mark.parametrize("other", [(1, 64), (0, 65), (64, 64)])
def test_different_ranges_do_not_combine(name: str, other: tuple[int, int]) -> None:
    a, b = YoungBitmap.from_gfns(0, 64, [5]), YoungBitmap.from_gfns(*other, [])
    with pytest.raises(LayoutError, match="different ranges"):
        OPERATORS[name](a, b)


@pytest.mark.parametrize("call", [lambda b: b & {5}, lambda b: b | [5], lambda b: b - 5])
def test_operators_take_bitmaps_alone(call: Callable[[YoungBitmap], object]) -> None:
    with pytest.raises(TypeError):
        call(YoungBitmap.from_gfns(0, 64, [5]))


def test_an_offset_alone_and_a_step_are_refused() -> None:
    bitmap = YoungBitmap.from_gfns(0, 64, [5])
    with pytest.raises(TypeError, match="gfn in"):
        bitmap[5]
    with pytest.raises(LayoutError, match="step"):
        bitmap[::2]


def test_two_sources_are_joined() -> None:
    a = YoungBitmap.from_gfns(0, 8, [1], provenance=Provenance("pagemap", "host", 10, 20))
    b = YoungBitmap.from_gfns(0, 8, [2], provenance=Provenance("dirty", "host", 15, 30))
    assert (a | b).provenance == Provenance("mixed", "host", 10, 30)
    assert (a & a).provenance == a.provenance
    c = YoungBitmap.from_gfns(0, 8, [2], provenance=Provenance("dirty", evidence="32 of 32"))
    assert (c | c[:]).provenance.evidence == "32 of 32"
    assert (b | c).provenance.evidence == "mixed"
