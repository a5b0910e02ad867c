"""Harvests of tables that a KVM goes on changing: nothing but accessed bits is ever written.

A process in the place of that KVM stores one value after another into each entry, and looks,
before each store, at what became of the last one. An entry may have lost its accessed bit if
it was a young leaf; it may not have changed otherwise, and may not hold an earlier value.
"""

from __future__ import annotations

import multiprocessing
import struct

import numpy as np
import pytest
from kvm_tables import ALL, Ept, Npt, Stage2, file_words, open_table

ROUNDS = 20_000
FORK = multiprocessing.get_context("fork")


def word(writer, value):
    """Return a value as a little-endian machine reads the entry."""
    return struct.unpack("<Q", struct.pack(writer.byte_order + "Q", value))[0]


def odd_values(writer):
    """What KVM has in entries that are no young leaves, with the accessed bit where it may be."""
    yield 0
    if isinstance(writer, (Npt, Ept)):
        yield 0x5A0  # frozen
        yield 1 << 63 | 0x5A0
        yield 1 << 51 | 0xFEE0_0000 | 0x7F8 | 0x7  # MMIO, with a generation
    elif isinstance(writer, Stage2):
        yield 1 << 10  # locked
        yield 0x3F << 2 | writer.accessed  # annotation of an owner
    else:
        yield writer.accessed
        yield 1 << 62 | writer.accessed  # a leaf that is not valid


def values_of(writer, level, pointer):
    """Return (all values that an entry can have, which of them are young leaves)."""
    accessed = word(writer, writer.accessed)
    old = [word(writer, writer.leaf_value(n << 9, level)) for n in (1, 2, 3)]
    young = [value | accessed for value in old]
    others = [word(writer, value) for value in odd_values(writer)]
    if level > 1:
        others = [word(writer, pointer), 0]
    is_young = [False] * len(old) + 3 * len(young) * [True] + [False] * len(others)
    return np.array(old + 3 * young + others, dtype=np.uint64), np.array(is_young)


def play_kvm(entries, values, is_young, accessed, results):
    """Store and look, round after round; send what went wrong."""
    rng = np.random.default_rng(1)
    choices = rng.integers(len(values), size=(256, entries.size))
    wrong = []
    stored = np.zeros(entries.size, dtype=np.uint64)
    may_lose = np.zeros(entries.size, dtype=bool)
    for i in range(ROUNDS):
        lost = entries ^ stored
        if (bad := (lost != 0) & ~((lost == accessed) & may_lose)).any():
            now = zip(stored[bad], (lost ^ stored)[bad], strict=True)
            wrong += [f"{before:#x} became {after:#x}" for before, after in now]
        choice = choices[i % 256]
        stored, may_lose = values[choice], is_young[choice]
        entries[:] = stored
    results.send(wrong)


@pytest.fixture(params=ALL, ids=lambda kind: kind.__name__)
def writer(request, tmp_path):
    return request.param(tmp_path / "ram")


@pytest.mark.parametrize("level", [1, 2])
def test_only_accessed_bits_of_young_leaves_are_written(writer, level):
    n_entries = 1 << writer.widths[-level]
    span = 1 << sum(writer.widths[len(writer.widths) - level + 1 :])
    pointer = writer.pointer(writer.table(writer.widths[-1]), writer.widths[-1])
    values, is_young = values_of(writer, level, pointer)
    gfn_start = n_entries * span
    at = writer.offset(writer.entry_pa(gfn_start, level))
    accessed = np.uint64(word(writer, writer.accessed))
    words = np.memmap(writer.path, dtype="<u8", mode="r+")
    entries = words[at // 8 : at // 8 + n_entries]
    outside = np.ones(words.size, dtype=bool)
    outside[at // 8 : at // 8 + n_entries] = False
    before = file_words(writer.path)[outside]
    ours, theirs = FORK.Pipe()
    # A process: threads of Python would take turns.
    kvm = FORK.Process(target=play_kvm, args=(entries, values, is_young, accessed, theirs))
    memory, table = open_table(writer)
    with memory, table:
        kvm.start()
        theirs.close()
        n_young = 0
        while not ours.poll():
            n_young += table.harvest(gfn_start, n_entries * span).count()
        assert ours.recv() == []
        kvm.join()
        cleared = table.stats()["cleared"]
    assert cleared > n_entries, "harvests met the changes"
    assert n_young >= cleared
    assert np.array_equal(file_words(writer.path)[outside], before)
