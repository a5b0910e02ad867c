"""``kvmhost bench mmu``: speed and scaling of the harvest, and the cost of lock and batch.

Parts: ``scan`` (compared with bare loops), ``sparse``, ``scale`` (1 TiB), ``aging``
(lockless and locked while vCPUs fault pages in), ``ways`` (the question of 2023: per page
or batched, locked or lockless, with or without a flush for every page). Figures are
medians, and the variants of a part take turns in one run, so that their ratios are valid
on a busy machine.
"""

from __future__ import annotations

import mmap
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from kvmhost._ffi import ffi, lib
from kvmhost.mmu.memslots import MemSlot, MemSlots
from kvmhost.mmu.soft import SoftEngine, Trace
from kvmhost.mmu.table import Mmu
from kvmhost.mmu.tlb import TlbGeometry
from kvmhost.tools.args import about
from kvmhost.tools.bench.mmushow import show
from kvmhost.tools.bench.mmuways import BATCH_PAGES, FORMATS, bench_ways, changes_of, spin
from kvmhost.tools.bench.walk import Step, interleaved
from kvmhost.tools.measured import bench_head
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.benchparts import (
    AgingKind,
    AgingRow,
    MmuOutput,
    MmuParameters,
    ScaleRow,
    ScanRow,
    SparseRow,
)
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option, listing, one_of

__all__ = ["PARTS", "main", "parser", "run"]

_GIB_PAGES = 1 << 18


def _nothing() -> None:
    pass


def bench_scan(n_entries: int, rounds: int) -> list[ScanRow]:
    """Harvest all-old and all-young tables of each format, compared with bare loops."""
    return [_scan_format(name, n_entries, rounds) for name in FORMATS]


def _scan_format(name: str, n_entries: int, rounds: int) -> ScanRow:
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
    return ScanRow(
        table_format=name,
        sum_ns_per_entry=median["sum"] / n_entries,
        wide_sum_ns_per_entry=median["wide_sum"] / n_entries,
        old_ns_per_entry=median["old"] / n_entries,
        and_ns_per_entry=median["and"] / n_entries,
        young_ns_per_entry=median["young"] / n_entries,
        old_of_sum_ratio=median["sum"] / median["old"],
        old_of_wide_sum_ratio=median["wide_sum"] / median["old"],
        young_of_and_ratio=median["young"] / median["and"],
    )


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


def bench_sparse(rounds: int, space_pages: int = 1024 * _GIB_PAGES) -> list[SparseRow]:
    """Harvest 1 GiB of mapped pages in a range of their size, and in a 1 TiB range."""
    rows = []
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
            rows.append(
                SparseRow(
                    table_format=name,
                    space_gib=n_gfns // _GIB_PAGES,
                    alone_us=median["alone"] / 1e3,
                    sparse_us=median["sparse"] / 1e3,
                    sparse_of_alone_ratio=median["sparse"] / median["alone"],
                )
            )
    return rows


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


def bench_scale(gib: int = 1024) -> list[ScaleRow]:
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
    return [
        ScaleRow(
            guest_gib=gib,
            n_entries=n,
            table_bytes=table_bytes,
            resident_bytes=resident,
            build_s=built - start,
            harvest_young_s=first - built,
            harvest_old_s=second - first,
        )
    ]


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123 (a kernel file)
        return int(statm.read().split()[1]) * resource.getpagesize()


def bench_aging(
    threads: Sequence[int] = (1, 2, 4, 8, 16), pages_per_vcpu: int = _GIB_PAGES, rounds: int = 5
) -> list[AgingRow]:
    """Fault in ``pages_per_vcpu`` pages on each vCPU while the same memory is aged.

    The rows are those of the 2024 table: vCPU wall time without aging, with locked aging
    and with lockless aging, each with the mean time of an aging pass (in batches of 64
    pages). Without aging, its thread sums numbers in other memory, so that the load on the
    cores is the same.
    """
    table = []
    for n in threads:
        runs: dict[AgingKind, list[tuple[float, float, int]]]
        runs = {"none": [], "locked": [], "lockless": []}
        for _ in range(rounds):
            for how in runs:
                runs[how].append(_aging_run(how, n, pages_per_vcpu))
        table += [
            AgingRow(
                n_vcpus=n,
                aging=how,
                vcpu_s=statistics.median(r[0] for r in rows),
                pass_s=statistics.median(r[1] for r in rows),
                lock_waits=round(statistics.median(r[2] for r in rows)),
                slowdown_ratio=statistics.median(
                    r[0] / alone[0] for r, alone in zip(rows, runs["none"], strict=True)
                ),
            )
            for how, rows in runs.items()
        ]
    return table


def _aging_run(how: AgingKind, n_vcpus: int, pages: int) -> tuple[float, float, int]:
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
                spin()
                continue
            begin = time.monotonic()
            table.age(0, total, BATCH_PAGES, locked=how == "locked", flush=False)
            aging_s += time.monotonic() - begin
            passes += 1
        run.wait()
        wall = time.monotonic() - start
        return wall, aging_s / max(passes, 1), table.counters()["lock_waits"]


PARTS = ("scan", "sparse", "scale", "aging", "ways")


def run(
    parts: Sequence[str] = PARTS,
    formats: Sequence[str] = FORMATS,
    done: Callable[[MmuOutput], None] = lambda result: None,
) -> MmuOutput:
    """Run the given parts.

    :param formats: of part ``ways``
    :param done: receives the result of each part when it has ended
    """
    empty = result = MmuOutput(
        **bench_head("mmu"),
        parameters=MmuParameters(parts=list(parts), table_formats=list(formats)),
        scan=[],
        sparse=[],
        scale=[],
        aging=[],
        ways=[],
        changes=[],
    )
    for part in parts:
        found = _run_part(part, formats)
        done(msgspec.structs.replace(empty, **found))
        result = msgspec.structs.replace(result, **found)
    return result


def _run_part(part: str, formats: Sequence[str]) -> dict[str, Any]:
    """Run a part; return the fields of :class:`MmuOutput` that it fills."""
    if part == "scan":
        return {"scan": bench_scan(4 << 20, 9)}
    if part == "sparse":
        return {"sparse": bench_sparse(25)}
    if part == "scale":
        return {"scale": bench_scale()}
    if part == "aging":
        return {"aging": bench_aging()}
    ways = bench_ways(formats=formats)
    return {"ways": ways, "changes": changes_of(ways)}


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(prog="kvmhost bench mmu", description=about(__doc__))
    add_option(
        parser,
        "--part",
        **listing(one_of("part", PARTS), default=list(PARTS)),
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
    if options.json:
        emit(run(options.part, options.format))
    else:
        run(options.part, options.format, show)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
