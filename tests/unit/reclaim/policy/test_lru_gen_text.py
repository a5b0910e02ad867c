from __future__ import annotations

import numpy as np
import pytest

from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy.lru_gen import LruGen
from kvmhost.reclaim.policy.lru_gen_text import (
    AgeCommand,
    EvictCommand,
    parse,
    parse_enabled,
    run,
    show,
    show_enabled,
    show_full,
)

MS = 1_000_000


def test_show_has_the_kernels_columns(pages):
    policy = LruGen(8)
    for now in (1000, 2500, 3000):
        policy.age(pages.words(8, [1]), now * MS)
    text = show(7, "vm1", policy, pages.mask(8, range(6)), 4000 * MS)
    assert text == (
        "memcg     7 vm1\n"
        " node     0\n"
        "          0       4000           5          0\n"
        "          1       3000           0          0\n"
        "          2       1500           0          0\n"
        "          3       1000           1          0\n"
    )


def test_show_full_has_the_tiers_and_the_sweep(pages):
    policy = LruGen(600)
    for now in (1, 2, 3):
        policy.age(pages.words(600, [1, 2, 599]), now * MS)
    policy.tiers.refaulted[1], policy.tiers.evicted[1], policy.tiers.protected[1] = 3, 40, 5
    policy.tiers.avg_refaulted[0], policy.tiers.avg_total[0] = 7, 90
    text = show_full(1, "vm1", policy, pages.everything(600), 4 * MS).splitlines()
    plain = show(1, "vm1", policy, pages.everything(600), 4 * MS).splitlines()
    assert [line for line in text if line in plain] == plain
    rest = " ".join(f"{0:10}x" for _ in range(3))
    # Below the oldest generation, its counts; below the youngest, averages and the sweep.
    assert text[4] == f"            {1:10} {3:10}r {40:10}e {5:10}p " + rest
    youngest = text.index(plain[-1])
    assert text[youngest + 1] == f"            {0:10} {7:10}R {90:10}T {0:10}x " + rest
    values = zip((600, 597, 3, 2, 2, 0), "LOYNFA", strict=True)
    assert text[-1] == " " * 22 + "".join(f" {n:10}{mark}" for n, mark in values)
    assert all(line.endswith("x") for line in text[2:youngest] if line not in plain)


@pytest.mark.parametrize(
    ("text", "caps"),
    [("y", 0xB), ("Yes\n", 0xB), ("n", 0), ("0x000b\n", 0xB), ("11", 0xB), ("013", 0xB), ("0", 0)],
)
def test_enabled_takes_what_the_kernels_file_takes(text, caps):
    policy = LruGen(8, caps=0xB)
    assert parse_enabled(text, policy) == caps
    policy.caps = caps
    assert show_enabled(policy) == f"0x{caps:04x}\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x", "'x' is neither y, n nor a number"),
        ("0xg", "neither y, n nor a number"),
        ("-1", "neither y, n nor a number"),
        ("0x1b", "need a mask of bits in 0xf"),
        ("0xf", r"0x4 \(non-leaf young\) has no effect.*use 0xb"),
        ("0x3", r"0x8 \(spte walk\) cannot be off.*use 0xb"),
        ("0x9", r"without 0x2 \(mm walk\).*probes = true"),
    ],
)
def test_enabled_refuses_what_would_do_nothing(text, problem):
    with pytest.raises(LayoutError, match=problem):
        parse_enabled(text, LruGen(8))


def test_mm_walk_can_be_off_with_probes():
    assert parse_enabled("9", LruGen(8, probes=True)) == 9


def test_parse():
    text = "+ vm1 0 5; - 3 0 4 60 1000,+2 0 9 0 1\n\n- vm1 0 1\n"
    assert parse(text) == [
        AgeCommand("vm1", 5),
        EvictCommand("3", 4, 60, 1000),
        AgeCommand("2", 9, False, True),
        EvictCommand("vm1", 1),
    ]
    assert parse(" \n;") == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("* vm 0 1", r"lru_gen command 1 \('\* vm 0 1'\): begins with '\*', need \+ to age or -"),
        (
            "+ vm 0 1; + vm 0",
            r"command 2 .*2 fields, need \+ vm node seq \[can_swap \[full_scan\]\]",
        ),
        ("- vm 0 1 2 3 4", r"6 fields, need - vm node seq \[swappiness \[nr\]\]"),
        ("+ vm 1 1", "node 1, there is only node 0"),
        ("+ vm 0 -1", "seq '-1' is not a number of 0 or more"),
        ("+ vm 0 x", "seq 'x' is not a number"),
        ("+ vm 0 1 201", "can_swap 201, need 0 to 200"),
        ("+ vm 0 1 1 max", "full_scan 'max' is not a number"),
        ("- vm 0 1 201", "swappiness 201, need 0 to 200"),
        ("- vm 0 1 200 many", "nr 'many' is not a number"),
        ("- vm 0 " + "9" * 30, "is not a number of 0 or more"),
    ],
)
def test_errors_name_command_and_field(text, problem):
    with pytest.raises(LayoutError, match=problem):
        parse(text)


class Work:
    def __init__(self, policy, pages):
        self.policy, self.pages, self.scans = policy, pages, []
        self.here = pages.everything(policy.n_pages)

    def age(self, full_scan):
        self.scans.append(full_scan)
        self.policy.age(self.pages.words(self.policy.n_pages, [0]), 0)

    def candidates(self):
        return self.here

    def evict(self, gfns):
        self.here = self.here.copy()
        self.here[gfns] = False
        self.policy.evicted(gfns, 0)
        return gfns.size


def run_all(text, policy, work):
    return [run(command, policy, work) for command in parse(text)]


def test_commands_age_and_evict(pages):
    policy = LruGen(8)
    work = Work(policy, pages)
    assert run_all("+ vm 0 0; + vm 0 1 1 0; + vm 0 2, + vm 0 0", policy, work) == [0, 0, 0, 0]
    # An older generation is passed over.
    assert (policy.max_seq, work.scans) == (3, [True, False, True])
    assert run_all("- vm 0 0 0; - vm 0 0 200 3; - vm 0 1", policy, work) == [0, 3, 4]
    assert np.flatnonzero(work.here).tolist() == [0]


def test_commands_on_generations_that_are_not_there_or_protected(pages):
    policy = LruGen(8)
    work = Work(policy, pages)
    with pytest.raises(LayoutError, match=r"\+ vm: seq 1, youngest is 0"):
        run_all("+ vm 0 1", policy, work)
    run_all("+ vm 0 0; + vm 0 1; + vm 0 2", policy, work)
    with pytest.raises(LayoutError, match="seq 2 is protected, youngest that may go is 1"):
        run_all("- vm 0 2", policy, work)
    assert work.here.all()


@pytest.mark.parametrize(
    ("text", "can_swap", "full_scan"),
    [("+1 0 5", True, True), ("+ 1 0 5 60", True, True), ("+ 1 0 5 0 7", False, True),
     ("+ 1 0 05 max 0", True, False)],
)  # fmt: skip
def test_what_the_kernel_takes_for_aging_is_taken(text, can_swap, full_scan):
    assert parse(text) == [AgeCommand("1", 5, can_swap, full_scan)]


def test_max_is_a_swappiness():
    assert parse("- 1 0 5 max 9") == [EvictCommand("1", 5, 200, 9)]
