"""``kvmhost bench mmu``: speed and scaling of the harvest, and the cost of lock and batch.

Parts: ``scan`` (compared with bare loops), ``sparse``, ``scale`` (1 TiB), ``aging``
(lockless and locked while vCPUs fault pages in), ``ways`` (the question of 2023: per page
or batched, locked or lockless, with or without a flush for every page). Figures are
medians, and the variants of a part take turns in one run, so that their ratios are valid
on a busy machine.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kvmhost._ffi import ffi, lib
from kvmhost.mmu.memslots import MemSlot, MemSlots
from kvmhost.mmu.soft import SoftEngine, SoftRun, Trace
from kvmhost.mmu.table import Mmu
from kvmhost.mmu.tlb import TlbGeometry
from kvmhost.tools.args import about
from kvmhost.tools.bench.walk import Step, interleaved
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option, listing, one_of

__all__ = ["FORMATS", "PARTS", "main", "parser", "run"]

FORMATS = ("npt", "ept", "stage2", "radix")
BATCH_PAGES = 64  # MIN_LRU_BATCH, the batch of the 2023 proposal
_GIB_PAGES = 1 << 18
_CYCLES_APART = 0.005


def _nothing() -> None:
    pass


def bench_scan(n_entries: int, rounds: int) -> dict[str, Any]:
    """Harvest all-old and all-young tables of each format, compared with bare loops."""
    return {name: _scan_format(name, n_entries, rounds) for name in FORMATS}


def _scan_format(name: str, n_entries: int, rounds: int) -> dict[str, float]:
    with Mmu(name, arena_bytes=max(64 << 20, 10 * n_entries)) as table:
        table.map(0, 0, n=n_entries)
        bare, words = _bare_entries(table, n_entries)
        # SAFETY: `words` views `bare`, which this frame holds until it returns.
        entries = ffi.cast("uint64_t *", words.ctypes.data)
        bit = _raw_bit(table)

        def touch() -> None:
            table.mark_young(0, n_entries)

        def touch_bare() -> None:
            lib.kh_bench_or(entries, n_entries, bit)

        steps: dict[str, Step] = {
            "sum": (_nothing, lambda: lib.kh_bench_sum(entries, n_entries)),
            "wide_sum": (_nothing, lambda: lib.kh_bench_sum_wide(entries, n_entries)),
            "old": (_nothing, lambda: table.harvest(0, n_entries)),
            "and": (touch_bare, lambda: lib.kh_bench_and(entries, n_entries, bit)),
            "young": (touch, lambda: table.harvest(0, n_entries)),
        }
        median = interleaved(steps, rounds)
        del bare
    return {
        **{f"{step}_ns": ns / n_entries for step, ns in median.items()},
        "old_of_sum": median["sum"] / median["old"],
        "old_of_wide_sum": median["wide_sum"] / median["old"],
        "young_of_and": median["young"] / median["and"],
    }


def _bare_entries(table: Mmu, n: int) -> tuple[mmap.mmap, Any]:
    """Return the same entries in plain shared memory, which an arena is made of too."""
    memory = mmap.mmap(-1, 8 * n)
    words = np.frombuffer(memory, dtype=np.uint64)
    first = int.from_bytes(table.format.to_memory(table.format.leaf(0)), "little")
    words[:] = np.uint64(first)
    return memory, words


def _raw_bit(table: Mmu) -> int:
    """Return the bit number of the accessed bit in memory."""
    raw = int.from_bytes(table.format.to_memory(table.format.accessed), "little")
    return raw.bit_length() - 1


def bench_sparse(rounds: int, space_pages: int = 1024 * _GIB_PAGES) -> dict[str, Any]:
    """Harvest 1 GiB of mapped pages in a range of their size, and in a 1 TiB range."""
    result: dict[str, Any] = {}
    for name in FORMATS:
        with Mmu(name, arena_bytes=64 << 20) as table:
            n_gfns = min(space_pages, table.n_gfns)
            base = n_gfns // 2
            table.map(base, 0, n=_GIB_PAGES)
            harvest = _raw_harvest(table)
            steps: dict[str, Step] = {
                "alone": (_nothing, lambda h=harvest, b=base: h(b, _GIB_PAGES)),  # type: ignore[misc]
                "sparse": (_nothing, lambda h=harvest, n=n_gfns: h(0, n)),  # type: ignore[misc]
            }
            median = interleaved(steps, rounds)
            result[name] = {
                "alone_us": median["alone"] / 1e3,
                "sparse_us": median["sparse"] / 1e3,
                "sparse_of_alone": median["sparse"] / median["alone"],
                "space_gib": n_gfns // _GIB_PAGES,
            }
    return result


def _raw_harvest(table: Mmu) -> Callable[[int, int], None]:
    """Harvest into preallocated bitmaps, so that only the walk is measured."""
    n_words = 1024 * _GIB_PAGES // 64
    young, coarse = np.zeros(n_words, np.uint64), np.zeros(n_words, np.uint64)
    pointers = [ffi.cast("uint64_t *", a.ctypes.data) for a in (young, coarse)]
    stats = ffi.new("struct kh_walk_stats *")
    segment = ffi.new("struct kh_segment *")

    def harvest(gfn_start: int, n_pages: int, keep: Any = (young, coarse)) -> None:
        segment.gfn_start, segment.n_pages = gfn_start, n_pages
        with table.hold_open() as mmu:
            # SAFETY: the arrays are held by `keep`.
            lib.kh_mmu_harvest(mmu, segment, 1, lib.KH_HARVEST_CLEAR, ffi.NULL, *pointers, stats)

    return harvest


def bench_scale(gib: int = 1024) -> dict[str, Any]:
    """Build and harvest an NPT table that maps ``gib`` GiB of guest memory in base pages."""
    n = gib * _GIB_PAGES
    before = _resident_bytes()
    with Mmu("npt", arena_bytes=n * 8 + n // 32 + (64 << 20)) as table:
        start = time.monotonic()
        table.map(0, 0, n=n, young=True)
        built = time.monotonic()
        young = table.harvest(0, n).count()
        first = time.monotonic()
        table.harvest(0, n)
        second = time.monotonic()
        table_bytes = table.counters()["table_bytes"]
        resident = _resident_bytes() - before
    if young != n:
        raise RuntimeError(f"{young} young of {n}")
    return {
        "gib": gib,
        "entries": n,
        "table_bytes": table_bytes,
        "resident_bytes": resident,
        "build_s": built - start,
        "harvest_young_s": first - built,
        "harvest_old_s": second - first,
        "build_entries_per_s": n / (built - start),
        "harvest_young_entries_per_s": n / (first - built),
        "harvest_old_entries_per_s": n / (second - first),
    }


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123 (a kernel file)
        return int(statm.read().split()[1]) * resource.getpagesize()


def bench_aging(
    threads: Sequence[int] = (1, 2, 4, 8, 16), pages_per_vcpu: int = _GIB_PAGES, rounds: int = 5
) -> dict[str, Any]:
    """Fault in ``pages_per_vcpu`` pages on each vCPU while the same memory is aged.

    The rows are those of the 2024 table: vCPU wall time without aging, with locked aging
    and with lockless aging, each with the mean time of an aging pass (in batches of 64
    pages). Without aging, its thread sums numbers in other memory, so that the load on the
    cores is the same.
    """
    result: dict[str, Any] = {}
    for n in threads:
        runs: dict[str, list[tuple[float, float, int]]] = {"none": [], "locked": [], "lockless": []}
        for _ in range(rounds):
            for how in runs:
                runs[how].append(_aging_run(how, n, pages_per_vcpu))
        result[str(n)] = {
            how: {
                "vcpu_s": statistics.median(r[0] for r in rows),
                "pass_s": statistics.median(r[1] for r in rows),
                "lock_waits": statistics.median(r[2] for r in rows),
                "slowdown": statistics.median(
                    r[0] / alone[0] for r, alone in zip(rows, runs["none"], strict=True)
                ),
            }
            for how, rows in runs.items()
        }
    return result


_SPIN = np.zeros(4096, dtype=np.uint64)


def _spin() -> None:
    """Keep a core as busy as aging would, without access to the tables."""
    pointer = ffi.cast("uint64_t *", _SPIN.ctypes.data)
    for _ in range(64):
        lib.kh_bench_sum(pointer, _SPIN.size)


def _aging_run(how: str, n_vcpus: int, pages: int) -> tuple[float, float, int]:
    total = n_vcpus * pages
    with Mmu("npt", arena_bytes=max(64 << 20, 10 * total)) as table:
        table.set_slots(MemSlots([MemSlot(0, 0, total, 1 << 40, huge=False)]))
        engine = SoftEngine(table, TlbGeometry())
        trace = Trace.sequential(0, pages, private=True, write_permille=1000)
        start = time.monotonic()
        run = engine.start(trace, n_vcpus=n_vcpus, n_accesses=pages)
        passes, aging_s = 0, 0.0
        while run.progress() < total:
            if how == "none":
                _spin()
                continue
            begin = time.monotonic()
            table.age(0, total, BATCH_PAGES, locked=how == "locked", flush=False)
            aging_s += time.monotonic() - begin
            passes += 1
        run.wait()
        wall = time.monotonic() - start
        return wall, aging_s / max(passes, 1), table.counters()["lock_waits"]


def bench_ways(
    n_pages: int = 1 << 15,
    n_accesses: int = 2_000_000,
    rounds: int = 5,
    formats: Sequence[str] = FORMATS,
) -> dict[str, Any]:
    """Run the 2x2x2 variants of 2023 on each format, and compute the effect of each change.

    One vCPU makes random accesses (half of them writes) through a TLB, and faults in pages
    that another part of the host keeps unmapping (512 pages every 5 ms, in every variant).
    The other core ages all pages repeatedly; without aging it sums numbers in other memory.
    ``ns_per_page`` is the cost of aging; ``slowdown`` is the vCPU's time for the same
    accesses, relative to its time without aging in the same round.
    """
    result: dict[str, Any] = {}
    ways = list(itertools.product((1, BATCH_PAGES), (True, False), (True, False)))
    for name in formats:
        alone: list[float] = []
        rows: dict[tuple[int, bool, bool], list[tuple[float, float]]] = {w: [] for w in ways}
        for _ in range(rounds):
            alone.append(_ways_run(name, None, n_pages, n_accesses)[1])
            for way in ways:
                rows[way].append(_ways_run(name, way, n_pages, n_accesses))
        cells = {
            _way_name(way): {
                "ns_per_page": statistics.median(r[0] for r in found),
                "slowdown": statistics.median(
                    r[1] / base for r, base in zip(found, alone, strict=True)
                ),
            }
            for way, found in rows.items()
        }
        result[name] = {"cells": cells, "factors": _factors(cells), "sentence": ""}
        result[name]["sentence"] = _sentence(name, result[name]["factors"])
    return result


def _way_name(way: tuple[int, bool, bool]) -> str:
    batch, locked, flush = way
    return " ".join(
        [
            "per-page" if batch == 1 else "batched",
            "locked" if locked else "lockless",
            "flush" if flush else "no-flush",
        ]
    )


def _factors(cells: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the factor by which each change reduces the cost of a page and the vCPU's time.

    Four pairs of cells differ only in one change. The result is the geometric mean of
    their four ratios, and the smallest and the largest one.
    """
    pairs = {"batching": ("per-page", "batched"), "no lock": ("locked", "lockless")}
    pairs["no flush"] = ("flush", "no-flush")
    found: dict[str, dict[str, float]] = {}
    for change, (before, after) in pairs.items():
        both = [
            (cells[name], cells[" ".join(after if w == before else w for w in name.split())])
            for name in cells
            if before in name.split()
        ]
        cost = [old["ns_per_page"] / new["ns_per_page"] for old, new in both]
        vcpu = [old["slowdown"] / new["slowdown"] for old, new in both]
        found[change] = {
            "cost": statistics.geometric_mean(cost),
            "cost_low": min(cost),
            "cost_high": max(cost),
            "vcpu": statistics.geometric_mean(vcpu),
        }
    return found


def _sentence(name: str, factors: dict[str, dict[str, float]]) -> str:
    parts = [
        f"{change} divides the cost of aging a page by {f['cost']:.1f} "
        f"({f['cost_low']:.1f} to {f['cost_high']:.1f}) and the vCPU's time by {f['vcpu']:.2f}"
        for change, f in sorted(factors.items(), key=lambda item: -item[1]["cost"])
    ]
    return f"{name}: " + "; ".join(parts) + "."


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
            _spin()
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


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "scan": lambda: bench_scan(4 << 20, 9),
    "sparse": lambda: bench_sparse(25),
    "scale": bench_scale,
    "aging": bench_aging,
    "ways": bench_ways,
}


def run(parts: Sequence[str] = tuple(PARTS)) -> dict[str, Any]:
    """Run the given parts; the result is keyed by part."""
    return {part: PARTS[part]() for part in parts}


def _print_scan(result: dict[str, Any]) -> None:
    print("format   old, of a sum   of a wide sum   young, times a bare and-loop")
    for name, r in result.items():
        print(
            f"{name:8} {r['old_of_sum']:13.2f} {r['old_of_wide_sum']:15.2f} "
            f"{r['young_of_and']:13.2f}   ({r['old_ns']:.2f} and {r['young_ns']:.2f} ns an entry)"
        )


def _print_sparse(result: dict[str, Any]) -> None:
    for name, r in result.items():
        print(
            f"{name:8} 1 GiB in {r['space_gib']} GiB takes {r['sparse_of_alone']:.2f} times "
            f"1 GiB alone ({r['sparse_us']:.0f} and {r['alone_us']:.0f} us)"
        )


def _print_scale(r: dict[str, Any]) -> None:
    print(
        f"{r['gib']} GiB of guest, {r['entries']:,} entries, {r['table_bytes'] / 2**30:.2f} GiB "
        f"of tables, {r['resident_bytes'] / 2**30:.2f} GiB resident: built in {r['build_s']:.1f} s "
        f"({r['build_entries_per_s'] / 1e6:.0f} M entries/s), "
        f"harvested young in {r['harvest_young_s']:.2f} s "
        f"({r['harvest_young_entries_per_s'] / 1e6:.0f} M/s), "
        f"old in {r['harvest_old_s']:.2f} s ({r['harvest_old_entries_per_s'] / 1e6:.0f} M/s)"
    )


def _print_aging(result: dict[str, Any]) -> None:
    print("vCPUs   none   locked (pass, slowdown)        lockless (pass, slowdown)")
    for n, r in result.items():
        print(
            f"{n:>5} {r['none']['vcpu_s']:6.2f}"
            + "".join(
                f"   {r[h]['vcpu_s']:6.2f} s ({r[h]['pass_s'] * 1e3:7.2f} ms, "
                f"{r[h]['slowdown']:.2f}x)"
                for h in ("locked", "lockless")
            )
        )


def _print_ways(result: dict[str, Any]) -> None:
    for name, r in result.items():
        print(f"{name:28} ns a page   vCPU slowdown")
        for way, cell in r["cells"].items():
            print(f"  {way:26} {cell['ns_per_page']:9.1f} {cell['slowdown']:12.2f}")
        print(f"  {r['sentence']}")


_PRINTERS = {
    "scan": _print_scan,
    "sparse": _print_sparse,
    "scale": _print_scale,
    "aging": _print_aging,
    "ways": _print_ways,
}


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(prog="kvmhost bench mmu", description=about(__doc__))
    add_option(
        parser,
        "--part",
        **listing(one_of("part", tuple(PARTS)), default=list(PARTS)),
        help=f"parts to run (default: {', '.join(PARTS)})",
    )
    add_option(
        parser,
        "--format",
        **listing(one_of("format", FORMATS), default=list(FORMATS)),
        help=f"ways: table formats (default: {', '.join(FORMATS)})",
    )
    add_option(parser, "--json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named parts, or all parts if none is named, and print tables or JSON."""
    options = parser().parse_args(argv)
    parts = dict(PARTS)
    parts["ways"] = lambda: bench_ways(formats=options.format)
    result = {}
    for part in options.part:
        result[part] = parts[part]()
        if not options.json:
            print(f"-- {part}")
            _PRINTERS[part](result[part])
    if options.json:
        print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
