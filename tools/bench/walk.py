"""``kvmhost bench walk``: harvest speed on a live table, relative to bare loops.

Every figure is a ratio of medians of variants that take turns in one run, so that a busy
or slow machine affects it little.
"""

from __future__ import annotations

import mmap
import statistics
import typing
from collections.abc import Callable, Sequence

import numpy as np

from kvmhost._ffi import ffi, lib
from kvmhost.bitmap import Words
from kvmhost.mmu.tablemem import TableMemory
from kvmhost.mmu.tdp import LiveTable
from kvmhost.tools.args import about, count
from kvmhost.tools.bench.bounds import BOUNDS
from kvmhost.tools.measured import bench_head
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.bench import LoopName, LoopRow, WalkOutput, WalkParameters
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import working
from kvmhost.tools.vocabulary import add_option

__all__ = ["interleaved", "main", "parser", "run"]

_PRESENT_WRITE = 3
_ACCESSED_BIT = 5
_LOOPS: tuple[LoopName, ...] = typing.get_args(LoopName)

Step = tuple[Callable[[], object], Callable[[], object]]


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Time named steps in turn; each step is (preparation, timed function).

    :return: median ns of each step
    """
    times: dict[str, list[int]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (prepare, timed) in steps.items():
            prepare()
            start = lib.kh_bench_now_ns()
            timed()
            times[name].append(lib.kh_bench_now_ns() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def run(n_entries: int = 4 << 20, rounds: int = 15) -> WalkOutput:
    """Harvest ``n_entries`` live entries, all old and all young, and time bare loops too."""
    memory, words, leaves = _build(n_entries)
    # SAFETY: `words` and `leaves` view `memory`, held by this frame until it returns.
    entries = ffi.cast("uint64_t *", leaves.ctypes.data)

    def nothing() -> None:
        pass

    def touch() -> None:
        lib.kh_bench_or(entries, n_entries, _ACCESSED_BIT)

    with LiveTable(TableMemory([(0, words.ctypes.data, len(memory))], memory), 0) as table:
        steps: dict[str, Step] = {
            "sum": (nothing, lambda: lib.kh_bench_sum(entries, n_entries)),
            "wide_sum": (nothing, lambda: lib.kh_bench_sum_wide(entries, n_entries)),
            "harvest_old": (nothing, lambda: table.harvest(0, n_entries)),
            "and": (touch, lambda: lib.kh_bench_and(entries, n_entries, _ACCESSED_BIT)),
            "harvest_young": (touch, lambda: table.harvest(0, n_entries)),
        }
        median = interleaved(steps, rounds)
    return WalkOutput(
        **bench_head("walk"),
        parameters=WalkParameters(n_entries=n_entries, rounds=rounds),
        scan="avx2" if lib.kh_scan_level(-1) else "scalar",
        loops=[LoopRow(loop=loop, ns_per_entry=median[loop] / n_entries) for loop in _LOOPS],
        old_of_sum_ratio=median["sum"] / median["harvest_old"],
        old_of_wide_sum_ratio=median["wide_sum"] / median["harvest_old"],
        young_of_and_ratio=median["harvest_young"] / median["and"],
    )


def _build(n_entries: int) -> tuple[mmap.mmap, Words, Words]:
    """Lay out a long-mode table at physical address 0: root first, leaf tables last."""
    n_leaf = -(-n_entries // 512)
    n_middle = -(-n_leaf // 512)
    if n_entries % 512 or n_middle > 512:
        raise ValueError(f"n_entries={n_entries}: need a multiple of 512, at most {1 << 27}")
    memory = mmap.mmap(-1, 4096 * (2 + n_middle + n_leaf))
    words: Words = np.frombuffer(memory, dtype=np.uint64)
    first_middle, first_leaf = 2, 2 + n_middle
    words[0] = 4096 | _PRESENT_WRITE
    words[512 : 512 + n_middle] = _pointers(first_middle, n_middle)
    at = first_middle * 512
    words[at : at + n_leaf] = _pointers(first_leaf, n_leaf)
    leaves = words[first_leaf * 512 :][:n_entries]
    leaves[:] = _pointers(0, n_entries)
    return memory, words, leaves


def _pointers(first_page: int, n: int) -> Words:
    pages = np.arange(first_page, first_page + n, dtype=np.uint64)
    return pages * np.uint64(4096) | np.uint64(_PRESENT_WRITE)


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(prog="kvmhost bench walk", description=about(__doc__))
    parser.add_argument(
        "--entries",
        type=count,
        default=4 << 20,
        metavar="N",
        help="entries of the page table (default: %(default)s)",
    )
    add_option(parser, "--rounds", default=15, help="measurements of each loop")
    add_option(parser, "--json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures as a table, or as JSON."""
    options = parser().parse_args(argv)
    with working("bench walk"):
        result = run(options.entries, options.rounds)
    if options.json:
        emit(result)
        return 0
    for row in result.loops:
        print(f"{row.loop:15} {row.ns_per_entry:7.2f} ns an entry")
    old, young = BOUNDS["walk.old_of_sum_ratio"], BOUNDS["walk.young_of_and_ratio"]
    print(f"all old:   {result.old_of_sum_ratio:.2f} of the speed of a plain sum ({old})")
    print(f"           {result.old_of_wide_sum_ratio:.2f} of the speed of a vectorised sum")
    print(f"all young: {result.young_of_and_ratio:.2f} times a bare atomic-and loop ({young})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
