"""One page, addresses, and two views of the same windows."""

from __future__ import annotations

import pytest

from kvmhost.bitmap import YoungBitmap
from kvmhost.errors import LayoutError
from kvmhost.reclaim.analyse.compare import CAUSES, TrackerView, compare_views, total
from kvmhost.reclaim.analyse.pagehistory import find_place, history_of, place_of_gfn
from kvmhost.reclaim.record.meta import Memslot

SLOTS = [Memslot(0, 0, 16, 0x7F0000000000), Memslot(3, 0x100, 8, 0x7F1000000000)]


@pytest.mark.parametrize(
    ("kind", "value", "slot"),
    [
        ("gpa", 0x103_123, 0),
        ("gfn", 0x103, 0),
        ("hva", 0x7F1000003123, 0),
        ("offset", 0x3123, 3),
    ],
)
def test_an_address_in_all_its_forms(kind, value, slot):
    place = find_place(value, kind, SLOTS, slot=slot)
    inside = 0 if kind == "gfn" else 0x123
    assert (place.gfn, place.gpa, place.slot) == (0x103, 0x103000 + inside, 3)
    assert place.slot_offset_bytes == 0x3000 + inside
    assert place.hva == 0x7F1000003000 + inside


@pytest.mark.parametrize(
    ("kind", "value", "slot"),
    [("gpa", 0x10000, 0), ("gfn", 0x108, 0), ("hva", 5, 0), ("offset", 0x8000, 3),
     ("offset", 0, 7), ("gfn", -1, 0)],
)  # fmt: skip
def test_an_address_in_no_slot(kind, value, slot):
    with pytest.raises(LayoutError, match=r"is in no memslot; memslots: slot 0 gfns \[0x0, 0x10\)"):
        find_place(value, kind, SLOTS, slot=slot)


def test_a_slot_whose_hva_is_not_known():
    assert place_of_gfn(3, [Memslot(0, 0, 8)]).hva is None
    with pytest.raises(LayoutError):
        find_place(0, "hva", [Memslot(0, 0, 8)])


def test_history_of_a_page(make_record):
    touched = {0, 1, 5, 70, 71, 72}
    record = make_record([[7] if t in touched else [9] for t in range(80)], n_pages=16)
    found = history_of(record, 7)
    assert (found.windows, found.young_windows, found.coarse_windows) == (80, 6, 0)
    assert (found.first_young, found.last_young, found.age_windows) == (0, 72, 8)
    assert found.longest_idle == 65
    shown = [(s.first, s.end, s.young) for s in found.stretches]
    assert shown == [(0, 2, True), (2, 5, False), (5, 6, True), (6, 70, False), (70, 73, True),
                     (73, 80, False)]  # fmt: skip
    assert found.stretches[1].since_s == 2.0
    never = history_of(record, 8)
    assert (never.first_young, never.age_windows, never.longest_idle) == (None, None, None)
    assert found.place.gpa == 7 << 12


def views(*pairs, **other):
    """Views of windows; each pair is (gfns of the reference, of the other)."""
    return (
        TrackerView("a", [YoungBitmap.from_gfns(0, 256, a) for a, _ in pairs]),
        TrackerView("b", [YoungBitmap.from_gfns(0, 256, b) for _, b in pairs], **other),
    )


def only(**pages):
    return dict.fromkeys(CAUSES, 0) | pages


def test_causes_of_differences():
    a, b = views(
        ([1, 100], [1, 101, 200]),  # 101 is beside 100; 200 is young in the reference later
        ([200], []),  # 200 was early in the other
        ([50], [50, 100]),  # nothing explains 100: it was young two windows before
    )
    first, second, third = compare_views(a, b)
    assert (first.extra, first.missing) == (only(early=1, around=1), only(around=1))
    assert (second.extra, second.missing) == (only(), only(late=1))
    assert (third.extra, third.missing) == (only(unexplained=1), only())
    whole = total([first, second, third])
    assert (whole.windows, whole.reference_pages, whole.pages, whole.both_pages) == (3, 4, 5, 2)
    assert (whole.precision, whole.recall, whole.jaccard) == (2 / 5, 2 / 4, 2 / 7)


def test_reads_tables_coarse_and_what_was_not_looked_at():
    a, b = views(([1, 2, 3], [3, 40]), only_writes=True)
    (found,) = compare_views(a, b, tables=[(40, 41), (1, 2)])
    assert (found.extra, found.missing) == (only(tables=1), only(tables=1, reads=1))
    rough = YoungBitmap.from_gfns(0, 256, range(32))
    rough = YoungBitmap(0, 256, rough.words, rough.words)
    (found,) = compare_views(
        TrackerView("a", [YoungBitmap.from_gfns(0, 256, [3])]), TrackerView("b", [rough])
    )
    assert found.extra == only(coarse=31)
    small = YoungBitmap.from_gfns(0, 4, [3])
    large = YoungBitmap.from_gfns(0, 256, [3, 99])
    (found,) = compare_views(TrackerView("a", [large]), TrackerView("b", [small]))
    assert found.missing == only(outside=1)
    apart = YoungBitmap.from_gfns(1000, 4, [1001])
    with pytest.raises(LayoutError, match="no pages in common"):
        list(compare_views(TrackerView("a", [large]), TrackerView("b", [apart])))


def test_nothing_to_compare():
    whole = total(compare_views(TrackerView("a", []), TrackerView("b", [])))
    assert (whole.windows, whole.precision, whole.recall, whole.jaccard) == (0, 1.0, 1.0, 1.0)


def test_repr_of_a_history(make_record):
    record = make_record([[1], [2], [1]])
    assert repr(history_of(record, 1)) == (
        "GfnHistory(gfn 0x1, young in 2 of 3 windows, last in window 2)"
    )
    assert (
        repr(history_of(record, 9)) == "GfnHistory(gfn 0x9, young in 0 of 3 windows, never young)"
    )
