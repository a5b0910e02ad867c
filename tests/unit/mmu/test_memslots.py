"""Memslots against a search of all of them."""

from __future__ import annotations

import random

import pytest

from kvmhost.errors import LayoutError
from kvmhost.mmu.memslots import MemSlot, MemSlots

PAGE = 4096
TOP = 1 << 64


def brute(slots, start, end):
    found = []
    for s in slots:
        for page in range(s.n_pages):
            hva = s.hva_start + page * PAGE
            if hva < end and hva + PAGE > start:
                found.append((s.slot, s.gfn_start + page, hva // PAGE - start // PAGE))
    return sorted(found)


def pieces(slots, start, end):
    return sorted(
        (p.slot.slot, p.gfn_start + i, p.index + i)
        for p in slots.in_hva_range(start, end)
        for i in range(p.n_pages)
    )


def test_hva_lookup_is_the_brute_search():
    rng = random.Random(3)
    for _ in range(300):
        base = rng.choice([0, 0x7F00_0000_0000, TOP - 200 * PAGE])
        rows, gfn = [], 0
        for number in range(rng.randrange(12)):
            gfn += rng.randrange(3)
            n = rng.randrange(1, 30)
            # hva ranges overlap freely; gfn ranges do not.
            rows.append(MemSlot(number, gfn, n, base + rng.randrange(200 - n + 1) * PAGE))
            gfn += n
        slots = MemSlots(rows)
        for _ in range(20):
            a = base + rng.randrange(200 * PAGE)
            b = min(TOP, a + rng.choice([1, PAGE, 7 * PAGE, 100 * PAGE]))
            assert pieces(slots, a, b) == brute(rows, a, b)
            if b == TOP:
                assert pieces(slots, a, 0) == brute(rows, a, b)
        for g in range(gfn + 2):
            owner = [s for s in rows if s.gfn_start <= g < s.gfn_end]
            assert slots.find(g) == (owner[0] if owner else None)


def test_gfn_range():
    slots = MemSlots([MemSlot(0, 10, 10, 0), MemSlot(1, 30, 10, 0), MemSlot(0, 0, 100, 0, as_id=1)])
    found = [(p.slot.slot, p.gfn_start, p.n_pages, p.index) for p in slots.in_gfn_range(15, 20)]
    assert found == [(0, 15, 5, 0), (1, 30, 5, 15)]
    assert [p.gfn_start for p in slots.in_gfn_range(0, 1000, 1)] == [0]
    assert list(slots.in_gfn_range(40, 100)) == []
    assert slots.find(9) is None
    assert slots.find(5, as_id=1).n_pages == 100


def test_a_thousand_slots_are_found_without_looking_at_all_of_them():
    slots = MemSlots([MemSlot(i, i * 10, 5, i * 100 * PAGE) for i in range(20_000)])
    looked = 0
    original = slots._hva_end

    def counting(slot):
        nonlocal looked
        looked += 1
        return original(slot)

    slots._hva_end = counting
    assert pieces(slots, 777_700 * PAGE, 777_703 * PAGE) == [(7777, 77770 + i, i) for i in range(3)]
    assert looked < 40


def test_changes_make_a_new_set():
    one = MemSlots([MemSlot(0, 0, 10, 0)])
    two = one.with_slot(MemSlot(1, 10, 10, 0))
    moved = two.with_slot(MemSlot(0, 100, 10, 0))
    gone = moved.without(1)
    assert (len(one), len(two), len(moved), len(gone)) == (1, 2, 2, 1)
    assert one.find(5) is not None
    assert moved.find(5) is None
    with pytest.raises(LayoutError, match="no such slot"):
        gone.without(1)


@pytest.mark.parametrize(
    "rows",
    [
        [MemSlot(0, 0, 10, 0), MemSlot(1, 9, 1, 0)],
        [MemSlot(0, 0, 10, 0), MemSlot(0, 20, 1, 0)],
        [MemSlot(0, 0, 0, 0)],
        [MemSlot(0, 0, 1, 100)],
        [MemSlot(0, 0, 2, TOP - PAGE)],
        [MemSlot(0, -1, 2, 0)],
        [MemSlot(0, (1 << 52) - 1, 2, 0)],
    ],
)
def test_what_does_not_fit_is_refused(rows):
    with pytest.raises(LayoutError):
        MemSlots(rows)
