"""Part ``ways`` of ``kvmhost bench mmu``: the eight ways of aging of 2023, and what changes bring.

The question was whether batching, no lock or no flush makes aging faster: each combination of
the three is measured on each table format.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
import typing
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvmhost._ffi import ffi, lib
from kvmhost.mmu.memslots import MemSlot, MemSlots
from kvmhost.mmu.soft import SoftEngine, SoftRun, Trace
from kvmhost.mmu.table import Mmu
from kvmhost.mmu.tlb import TlbGeometry
from kvmhost.tools.outputs.benchparts import Change, ChangeRow, WayRow

__all__ = ["BATCH_PAGES", "FORMATS", "bench_ways", "changes_of", "spin"]

FORMATS = ("npt", "ept", "stage2", "radix")
BATCH_PAGES = 64  # MIN_LRU_BATCH, the batch of the 2023 proposal
_CYCLES_APART = 0.005


def bench_ways(
    n_pages: int = 1 << 15,
    n_accesses: int = 2_000_000,
    rounds: int = 5,
    formats: Sequence[str] = FORMATS,
) -> list[WayRow]:
    """Run the 2x2x2 variants of 2023 on each format.

    One vCPU makes random accesses (half of them writes) through a TLB, and faults in pages
    that another part of the host keeps unmapping (512 pages every 5 ms, in every variant).
    The other core ages all pages repeatedly; without aging it sums numbers in other memory.
    """
    table = []
    ways = list(itertools.product((1, BATCH_PAGES), (True, False), (True, False)))
    for name in formats:
        alone: list[float] = []
        rows: dict[tuple[int, bool, bool], list[tuple[float, float]]] = {w: [] for w in ways}
        for _ in range(rounds):
            alone.append(_ways_run(name, None, n_pages, n_accesses)[1])
            for way in ways:
                rows[way].append(_ways_run(name, way, n_pages, n_accesses))
        table += [
            WayRow(
                table_format=name,
                batch_pages=batch,
                locked=locked,
                flush=flush,
                ns_per_page=statistics.median(ns for ns, _ in found),
                slowdown_ratio=statistics.median(
                    vcpu_s / base for (_, vcpu_s), base in zip(found, alone, strict=True)
                ),
            )
            for (batch, locked, flush), found in rows.items()
        ]
    return table


def changes_of(ways: Sequence[WayRow]) -> list[ChangeRow]:
    """Return the factor by which each change reduces the cost of a page and the vCPU's time.

    Four pairs of ways of a format differ only in one change. The result is the geometric
    mean of their four ratios, and the smallest and the largest one.
    """
    return [
        _change(name, change, [way for way in ways if way.table_format == name])
        for name in dict.fromkeys(way.table_format for way in ways)
        for change in typing.get_args(Change)
    ]


def _change(table_format: str, change: Change, ways: Sequence[WayRow]) -> ChangeRow:
    by_kind = {_kind(way): way for way in ways}
    number = typing.get_args(Change).index(change)
    pairs = [
        (old, by_kind[(*kind[:number], True, *kind[number + 1 :])])
        for kind, old in by_kind.items()
        if not kind[number]
    ]
    cost = [old.ns_per_page / new.ns_per_page for old, new in pairs]
    return ChangeRow(
        table_format=table_format,
        change=change,
        cost_ratio=statistics.geometric_mean(cost),
        min_cost_ratio=min(cost),
        max_cost_ratio=max(cost),
        vcpu_ratio=statistics.geometric_mean(
            old.slowdown_ratio / new.slowdown_ratio for old, new in pairs
        ),
    )


def _kind(way: WayRow) -> tuple[bool, ...]:
    """Return which of the changes a way has, in the order of :data:`Change`."""
    return (way.batch_pages > 1, not way.locked, not way.flush)


def _ways_run(
    name: str, way: tuple[int, bool, bool] | None, n_pages: int, n_accesses: int
) -> tuple[float, float]:
    """Return (ns to age one page, seconds that the vCPU ran)."""
    with Mmu(name, arena_bytes=64 << 20) as table:
        slot = MemSlot(0, 0, n_pages, 1 << 40, huge=False)
        table.set_slots(MemSlots([slot]))
        engine = SoftEngine(table, TlbGeometry())
        engine.run(Trace.sequential(0, n_pages, write_permille=1000), n_vcpus=1, n_accesses=n_pages)
        trace = Trace.random(0, n_pages, write_permille=500)
        with _apart() as settle:
            run = engine.start(trace, n_vcpus=1, n_accesses=n_accesses)
            settle()
            return _age_until_done(table, run, way, n_pages, n_accesses)


@contextlib.contextmanager
def _apart() -> Iterator[Callable[[], None]]:
    """Place threads that are started in the block on a different core than this thread.

    On a loaded machine the scheduler may otherwise place both on one core, where they do
    not run concurrently. Call the yielded function once all threads have been started.
    """
    cores = os.sched_getaffinity(0)
    mine = min(cores)
    os.sched_setaffinity(0, cores - {mine} or cores)
    try:
        yield lambda: os.sched_setaffinity(0, {mine})
    finally:
        os.sched_setaffinity(0, cores)


def _age_until_done(
    table: Mmu, run: SoftRun, way: tuple[int, bool, bool] | None, n_pages: int, n_accesses: int
) -> tuple[float, float]:
    aged, aging_s, at = 0, 0.0, 0
    next_unmap = time.monotonic()
    # At least one part is aged, even if the vCPU ends first.
    while run.progress() < n_accesses or (way is not None and not aged):
        if time.monotonic() >= next_unmap:
            table.unmap(at, at + 512)
            at = (at + 512) % n_pages
            next_unmap += _CYCLES_APART
        if way is None:
            spin()
            continue
        batch, locked, flush = way
        # Age only a part of the pages at a time, so that the unmaps stay on schedule.
        first = aged % n_pages
        begin = time.monotonic()
        table.age(first, first + 1024, batch, locked=locked, flush=flush)
        aging_s += time.monotonic() - begin
        aged += 1024
    (report,) = run.wait()
    return aging_s / max(aged, 1) * 1e9, report.busy_ns / 1e9


_SPIN = np.zeros(4096, dtype=np.uint64)


def spin() -> None:
    """Keep a core as busy as aging would, without access to the tables."""
    pointer = ffi.cast("uint64_t *", _SPIN.ctypes.data)
    for _ in range(64):
        lib.kh_bench_sum(pointer, _SPIN.size)
