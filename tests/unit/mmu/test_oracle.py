"""Every operation against a brute-force dictionary of leaves.

The model knows nothing of tables: it is a dictionary of leaves, searched from end to end.
It says what each operation must return and what must be mapped afterwards; after every
sequence the whole table is compared leaf by leaf.

Ordinary runs take some hundreds of sequences a format through hypothesis (which shrinks a
failure) and 300 through a plain generator; ``-m slow`` takes 10,000 through hypothesis.
"""

from __future__ import annotations

import dataclasses
import errno
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvmhost.bitmap import pack, unpack
from kvmhost.mmu.memslots import MemSlot, MemSlots
from kvmhost.mmu.table import Mmu

FORMATS = {
    "npt": ("npt", {}),
    "npt-5": ("npt", {"levels": 5}),
    "ept": ("ept", {}),
    "stage2": ("stage2", {}),
    "stage2-32": ("stage2", {"ipa_bits": 32}),
    "stage2-48": ("stage2", {"ipa_bits": 48}),
    "stage2-sw": ("stage2", {"sw_access": True}),
    "radix": ("radix", {}),
    "radix-64k": ("radix", {"page_shift": 16}),
    "radix-sw": ("radix", {"sw_access": True}),
}


@dataclasses.dataclass
class Leaf:
    level: int
    pfn: int
    write: bool
    young: bool
    dirty: bool


def refused(call, *args, **fields):
    """Return the errno that a call raised, 0 if it did what it was asked."""
    try:
        call(*args, **fields)
    except OSError as error:
        return error.errno
    return 0


class Pair:
    """A table and its model, always given the same operation."""

    def __init__(self, name, *, poison):
        table_format, fields = FORMATS[name]
        # A walk looks at each entry twice where freed pages hold poison: both ways are run.
        self.mmu = Mmu(table_format, poison=poison, arena_bytes=8 << 20, **fields)
        self.stage2 = table_format == "stage2"
        self.sw = fields.get("sw_access", False)
        self.frames = self.mmu.page_bytes // 4096
        self.pages = {
            level: self.mmu.level_pages(level) for level in range(1, self.mmu.max_leaf_level + 1)
        }
        self.leaves = {}
        self.small = set()  # where a table may stand in the way of a huge leaf
        two, top = self.pages[2], self.mmu.n_gfns
        three = self.pages[3] if self.mmu.max_leaf_level >= 3 else two * 16
        page = self.mmu.page_bytes
        rows = [
            MemSlot(0, 0, 2 * two, 0x1000_0000_0000, huge=False),
            MemSlot(1, 3 * two, two, 0x2000_0000_0000, read_only=True, huge=False),
            MemSlot(2, three, three, 0x3000_0000_0000, huge=False),
            MemSlot(3, top - two, two, 2**64 - two * page, huge=False),
        ]
        self.slots = MemSlots(rows, page_bytes=page)
        self.mmu.set_slots(self.slots)
        # Places that operations are aimed at: slots, the hole between, and the very end.
        self.windows = [(0, 4 * two), (three, three + 2 * two), (top - two, top)]

    def close(self):
        self.mmu.close()

    # The model's own helpers: searches of the dictionary.

    def touching(self, start, end):
        return [
            (gfn, leaf)
            for gfn, leaf in self.leaves.items()
            if gfn < end and gfn + self.pages[leaf.level] > start
        ]

    def at(self, gfn):
        found = self.touching(gfn, gfn + 1)
        return found[0][1] if found else None

    def spot(self, window, offset):
        start, end = self.windows[window % 3]
        return start + offset % (end - start)

    def span(self, window, offset, n):
        start, end = self.windows[window % 3]
        first = start + offset % (end - start)
        return first, min(end, first + n)

    # Operations.

    def map(self, window, offset, level, pfn, write, young, dirty):
        level = min(level, self.mmu.max_leaf_level)
        pages = self.pages[level]
        gfn = self.spot(window, offset) // pages * pages
        pfn = pfn % 1024 * pages * self.frames
        taken = bool(self.touching(gfn, gfn + pages))
        error = refused(self.mmu.map, gfn, pfn, level, write=write, young=young, dirty=dirty)
        if error:
            assert error == errno.EEXIST
            assert taken or (level > 1 and any(gfn <= g < gfn + pages for g in self.small))
            return
        assert not taken
        dirty = dirty and (write or not self.stage2)
        self.leaves[gfn] = Leaf(level, pfn, write, young, dirty)
        self.note_tables(gfn, level)

    def fill(self, window, offset, pfn, young):
        """Map a whole last-level table, so that there is something to collapse."""
        two = self.pages[2]
        gfn = self.spot(window, offset) // two * two
        if self.touching(gfn, gfn + two):
            return
        pfn = pfn % 1024 * two * self.frames
        self.mmu.map(gfn, pfn, 1, n=two, young=young)
        for i in range(two):
            self.leaves[gfn + i] = Leaf(1, pfn + i * self.frames, True, young, False)
        self.note_tables(gfn, 1)

    def note_tables(self, gfn, level):
        for above in range(level + 1, self.mmu.max_leaf_level + 1):
            self.small.add(gfn // self.pages[above] * self.pages[above])

    def unmap(self, window, offset, n):
        start, end = self.span(window, offset, n)
        gone = self.touching(start, end)
        assert self.mmu.unmap(start, end) == bool(gone)
        for gfn, _ in gone:
            del self.leaves[gfn]

    def write_protect(self, window, offset, n):
        start, end = self.span(window, offset, n)
        hit = [leaf for _, leaf in self.touching(start, end) if leaf.write]
        assert self.mmu.write_protect(start, end) == bool(hit)
        for leaf in hit:
            leaf.write = False
            leaf.dirty = leaf.dirty and not self.stage2

    def split(self, window, offset, n):
        start, end = self.span(window, offset, n)
        any_split = False
        while huge := [(g, leaf) for g, leaf in self.touching(start, end) if leaf.level > 1]:
            any_split = True
            for gfn, leaf in huge:
                del self.leaves[gfn]
                step = self.pages[leaf.level - 1]
                for i in range(self.pages[leaf.level] // step):
                    self.leaves[gfn + i * step] = dataclasses.replace(
                        leaf, level=leaf.level - 1, pfn=leaf.pfn + i * step * self.frames
                    )
                self.note_tables(gfn, leaf.level - 1)
        assert self.mmu.split(start, end) == any_split

    def collapse(self, window, offset, level):
        level = min(level, self.mmu.max_leaf_level)
        pages, step = self.pages[level], self.pages[level - 1]
        gfn = self.spot(window, offset) // pages * pages
        parts = [self.leaves.get(gfn + i) for i in range(0, pages, step)]
        first = parts[0]
        fits = first is not None and first.pfn % (pages * self.frames) == 0
        fits = fits and all(
            part is not None
            and part.level == level - 1
            and part.write == first.write
            and part.pfn == first.pfn + i * step * self.frames
            for i, part in enumerate(parts)
        )
        error = refused(self.mmu.collapse, gfn, level)
        if error:
            assert error == errno.EINVAL
            assert not fits
            return
        assert fits
        for i in range(0, pages, step):
            del self.leaves[gfn + i]
        young, dirty = any(p.young for p in parts), any(p.dirty for p in parts)
        self.leaves[gfn] = Leaf(level, first.pfn, first.write, young, dirty)

    def access(self, window, offset, write):
        gfn = self.spot(window, offset)
        leaf = self.at(gfn)
        if leaf is None:
            expected = 1
        elif write and (not leaf.write or (self.sw and self.stage2 and not leaf.dirty)):
            expected = 3
        elif self.sw and not leaf.young:
            expected = 2
        elif self.sw and write and not leaf.dirty:
            expected = 3
        else:
            expected = 0
            leaf.young, leaf.dirty = True, leaf.dirty or write
        assert self.mmu.access(gfn, write) == expected

    def touch(self, window, offset, write):
        gfn = self.spot(window, offset)
        slot = next((s for s in self.slots if s.gfn_start <= gfn < s.gfn_end), None)
        leaf = self.at(gfn)
        # Hardware needs no slot where the leaf allows the access already.
        if leaf and leaf.young and (not write or (leaf.write and leaf.dirty)):
            self.mmu.touch(gfn, write)
            return
        needs_fault = leaf is None or self.sw or (write and not leaf.write)
        if needs_fault and (slot is None or (write and slot.read_only)):
            if leaf is not None and not self.sw:
                assert write
            with pytest.raises(OSError, match="kh_mmu_touch") as caught:
                self.mmu.touch(gfn, write)
            assert caught.value.errno == (14 if slot is None else 30)
            return
        self.mmu.touch(gfn, write)
        if leaf is None:
            pfn = self.mmu.slot_pfn(slot) + (gfn - slot.gfn_start) * self.frames
            leaf = self.leaves[gfn] = Leaf(1, pfn, not slot.read_only, True, write)
            self.note_tables(gfn, 1)
        leaf.young = True
        if write:
            leaf.write = leaf.dirty = True

    def clear_young(self, window, offset, n, flush):
        start, end = self.span(window, offset, n)
        hit = [leaf for _, leaf in self.touching(start, end) if leaf.young]
        assert self.mmu.test_young(start, end) == bool(hit)
        clear = self.mmu.clear_flush_young if flush else self.mmu.clear_young
        assert clear(start, end) == bool(hit)
        for leaf in hit:
            leaf.young = False

    def expect(self, start, n, clear, asked, field):
        """What a harvest must report; clears in the model."""
        young, coarse = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        for slot in self.slots:
            lo, hi = max(slot.gfn_start, start), min(slot.gfn_end, start + n)
            for gfn, leaf in self.touching(lo, hi) if lo < hi else []:
                if not getattr(leaf, field):
                    continue
                first = max(gfn, lo) - start
                last = min(gfn + self.pages[leaf.level], hi) - start
                young[first:last] = True
                coarse[first:last] = leaf.level > 1
                if clear and asked[first:last].any():
                    setattr(leaf, field, False)
        return young, coarse

    def harvest(self, window, offset, n, clear, mask_seed, field):
        start, end = self.span(window, offset, n)
        n = end - start
        asked = np.ones(n, dtype=bool)
        if mask_seed is not None:
            asked = np.random.default_rng(mask_seed).random(n) < 0.3
        young, coarse = self.expect(start, n, clear, asked, field)
        run = self.mmu.harvest if field == "young" else self.mmu.harvest_dirty
        found = run(start, n, clear, mask=None if mask_seed is None else pack(asked))
        assert np.array_equal(found.as_bool(), young)
        assert np.array_equal(found.coarse_as_bool(), coarse)

    def wire(self, slot, offset, n, mask_seed):
        row = list(self.slots)[slot % len(self.slots)]
        first = offset % row.n_pages
        n = min(n, row.n_pages - first)
        asked = np.random.default_rng(mask_seed).random(n) < 0.5
        young, _ = self.expect(row.gfn_start + first, n, True, asked, "young")
        bitmap = pack(asked[::-1])
        hva = row.hva_start + first * self.mmu.page_bytes
        end = hva + n * self.mmu.page_bytes
        count = self.mmu.test_clear_young(hva, end if end < 2**64 else 0, bitmap)
        assert count == young.sum()
        assert np.array_equal(unpack(bitmap, n)[::-1], asked ^ young)

    def zap_all(self):
        self.mmu.zap_all()
        self.leaves.clear()
        self.small.clear()

    def check(self):
        """The whole table is what the model says, and nothing was lost on the way."""
        for gfn, leaf in self.leaves.items():
            level, entry = self.mmu.leaf(gfn)
            assert (level, entry.pfn, entry.young, entry.dirty) == (
                leaf.level,
                leaf.pfn,
                leaf.young,
                leaf.dirty,
            )
            assert entry.write == leaf.write
        for start, end in self.windows:
            for gfn in (start, (start + end) // 2, end - 1):
                assert (self.mmu.leaf(gfn) is not None) == (self.at(gfn) is not None)
        walked, counted = self.mmu.stats(), self.mmu.counters()
        assert walked["bad_pointers"] == walked["poisoned"] == walked["lost"] == 0
        still = sum(leaf.young for leaf in self.leaves.values())
        born = counted["born_young"] + counted["set_young"] + counted["copied_young"]
        gone = counted["cleared_young"] + counted["dropped_young"] + counted["merged_young"]
        assert born - gone - self.harvested() == still

    def harvested(self):
        return self.mmu.stats()["cleared"] - self.dirty_cleared

    dirty_cleared = 0

    def harvest_dirty(self, window, offset, n, clear, mask_seed):
        before = self.mmu.stats()["cleared"]
        self.harvest(window, offset, n, clear, mask_seed, "dirty")
        self.dirty_cleared += self.mmu.stats()["cleared"] - before


offsets = st.integers(0, 2047)
windows = st.integers(0, 2)
lengths = st.sampled_from([1, 2, 63, 64, 65, 300, 512, 1500])
masks = st.none() | st.integers(0, 99)


def machine(name):
    class Machine(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.pair = Pair(name, poison=False)

        def teardown(self):
            try:
                self.pair.check()
            finally:
                self.pair.close()

        @rule(
            w=windows,
            o=offsets,
            level=st.integers(1, 3),
            pfn=st.integers(0, 99),
            write=st.booleans(),
            young=st.booleans(),
            dirty=st.booleans(),
        )
        def map(self, w, o, level, pfn, write, young, dirty):
            self.pair.map(w, o, level, pfn, write, young, dirty)

        @rule(w=windows, o=offsets, pfn=st.integers(0, 99), young=st.booleans())
        def fill(self, w, o, pfn, young):
            self.pair.fill(w, o, pfn, young)

        @rule(w=windows, o=offsets, n=lengths)
        def unmap(self, w, o, n):
            self.pair.unmap(w, o, n)

        @rule(w=windows, o=offsets, n=lengths)
        def write_protect(self, w, o, n):
            self.pair.write_protect(w, o, n)

        @rule(w=windows, o=offsets, n=st.sampled_from([1, 600]))
        def split(self, w, o, n):
            self.pair.split(w, o, n)

        @rule(w=windows, o=offsets, level=st.integers(2, 3))
        def collapse(self, w, o, level):
            self.pair.collapse(w, o, level)

        @rule(w=windows, o=offsets, write=st.booleans())
        def access(self, w, o, write):
            self.pair.access(w, o, write)

        @rule(w=windows, o=offsets, write=st.booleans())
        def touch(self, w, o, write):
            self.pair.touch(w, o, write)

        @rule(w=windows, o=offsets, n=lengths, flush=st.booleans())
        def clear_young(self, w, o, n, flush):
            self.pair.clear_young(w, o, n, flush)

        @rule(w=windows, o=offsets, n=lengths, clear=st.booleans(), mask=masks)
        def harvest(self, w, o, n, clear, mask):
            self.pair.harvest(w, o, n, clear, mask, "young")

        @rule(w=windows, o=offsets, n=lengths, clear=st.booleans(), mask=masks)
        def harvest_dirty(self, w, o, n, clear, mask):
            self.pair.harvest_dirty(w, o, n, clear, mask)

        @rule(slot=st.integers(0, 3), o=offsets, n=lengths, mask=st.integers(0, 99))
        def wire(self, slot, o, n, mask):
            self.pair.wire(slot, o, n, mask)

        @rule()
        def zap_all(self):
            self.pair.zap_all()

        @invariant()
        def nothing_poisoned(self):
            assert self.pair.mmu.stats()["poisoned"] == 0

    return Machine


def _run(name, examples):
    run_state_machine_as_test(
        machine(name),
        settings=settings(
            max_examples=examples,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


@pytest.mark.parametrize("name", FORMATS)
def test_hypothesis_sequences(name):
    _run(name, 60)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_hypothesis_sequences(name, part):
    """Ten times a thousand, each drawn anew."""
    _run(name, 1000)


def random_sequence(pair, rng, steps):
    def where():
        return rng.randrange(3), rng.randrange(2048)

    def length():
        return rng.choice([1, 2, 63, 64, 65, 300, 512, 1500])

    def coin():
        return rng.random() < 0.5

    def mask():
        return None if coin() else rng.randrange(100)

    actions = [
        lambda: pair.map(*where(), rng.randint(1, 3), rng.randrange(99), coin(), coin(), coin()),
        lambda: pair.map(*where(), 1, rng.randrange(99), coin(), coin(), coin()),
        lambda: pair.fill(*where(), rng.randrange(99), coin()),
        lambda: pair.unmap(*where(), length()),
        lambda: pair.write_protect(*where(), length()),
        lambda: pair.split(*where(), rng.choice([1, 600])),
        lambda: pair.collapse(*where(), rng.randint(2, 3)),
        lambda: pair.access(*where(), coin()),
        lambda: pair.touch(*where(), coin()),
        lambda: pair.touch(*where(), coin()),
        lambda: pair.clear_young(*where(), length(), coin()),
        lambda: pair.harvest(*where(), length(), coin(), mask(), "young"),
        lambda: pair.harvest(*where(), length(), coin(), mask(), "young"),
        lambda: pair.harvest_dirty(*where(), length(), coin(), mask()),
        lambda: pair.wire(rng.randrange(4), rng.randrange(2048), length(), rng.randrange(100)),
        pair.zap_all,
    ]
    weights = [4, 6, 1, 3, 2, 2, 3, 6, 4, 4, 3, 4, 4, 3, 4, 0.3]
    for action in rng.choices(actions, weights, k=steps):
        action()


@pytest.mark.parametrize("name", FORMATS)
def test_many_random_sequences(name):
    """Seeded, so that a failure names the sequence: ``Pair(name)`` and its number."""
    for number in range(300):
        pair = Pair(name, poison=number % 2 == 0)
        try:
            random_sequence(pair, random.Random(number), 12)
            pair.check()
        except Exception as error:
            error.add_note(f"sequence {number} of {name}")
            raise
        finally:
            pair.close()
