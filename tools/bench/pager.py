"""``kvmhost bench pager``: fault-in latency, eviction, codecs, and memory of the pager.

Fault-in latency and evictions are compared with a minimal C pager, and the codecs with
each other. The minimal pager copies pages out, punches them, and copies them back in a
separate thread. For both pagers, the same thread touches the same pages in the same
order, through the same kind of mapping. They take turns in one run.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmhost._ffi import check, ffi, lib
from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.memory.guest import GuestMemory
from kvmhost.pager.codec import find_codec
from kvmhost.pager.options import StoreOptions
from kvmhost.pager.pager import Pager
from kvmhost.pager.results import EvictOutcome
from kvmhost.pager.userfault import Userfault
from kvmhost.temporary import temporary_folder
from kvmhost.tools.args import about
from kvmhost.tools.measured import bench_head
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.benchparts import (
    CodecRow,
    FaultInRow,
    OverheadRow,
    PagerOutput,
    PagerParameters,
)
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import working
from kvmhost.tools.vocabulary import add_option, listing, one_of
from kvmhost.units import PAGE_BYTES

__all__ = [
    "CONTENTS",
    "contents",
    "main",
    "parser",
    "run",
    "run_codecs",
    "run_faults",
    "run_overhead",
]

Pages = npt.NDArray[np.uint64]

#: Parts of the benchmark.
PARTS = ("codecs", "faults", "overhead")

#: Kinds of page content, made by :func:`contents`.
CONTENTS = ("counters", "pointers", "program", "random", "text", "zero")


def contents(n_pages: int) -> dict[str, Pages]:
    """Return page contents by name, each ``(n_pages, 512)`` words.

    ``text`` is Python's standard library, ``program`` the interpreter, ``counters`` small
    numbers in 64-bit words, ``pointers`` addresses into one heap.
    """
    rng = np.random.default_rng(11)
    shape = (n_pages, 512)
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes() for path in library)
    program = Path(os.path.realpath(sys.executable)).read_bytes()
    heap = 0x7F0000000000 + rng.integers(0, 1 << 20, shape) * 16
    return {
        "zero": np.zeros(shape, dtype=np.uint64),
        "counters": rng.integers(0, 1 << 10, shape).astype(np.uint64),
        "pointers": heap.astype(np.uint64),
        "text": _tiled(text, shape),
        "program": _tiled(program, shape),
        "random": rng.integers(0, 1 << 63, shape).astype(np.uint64),
    }


def _tiled(data: bytes, shape: tuple[int, int]) -> Pages:
    words = np.frombuffer(data[: len(data) // 8 * 8], dtype="<u8")
    return np.resize(words, shape).astype(np.uint64)


# -- codecs --------------------------------------------------------------------


def run_codecs(n_pages: int = 2048, rounds: int = 5) -> list[CodecRow]:
    """Put pages into an in-memory store and get them back, for each codec and content."""
    rows = []
    for kind, pages in contents(n_pages).items():
        for name in ("lz4", "zstd", "none"):
            try:
                checked, bare = find_codec(name), find_codec(name, False)
            except CapabilityError:
                continue
            turns = [(_store(checked.core, pages), _store(bare.core, pages)) for _ in range(rounds)]
            with_sum, without = zip(*turns, strict=True)
            rows.append(
                CodecRow(
                    content=kind,
                    codec=name,
                    compression_ratio=n_pages * PAGE_BYTES / with_sum[0].stored_bytes
                    if with_sum[0].stored_bytes
                    else None,
                    same_filled_pages=int(with_sum[0].same_filled_pages),
                    raw_pages=int(with_sum[0].raw_pages),
                    put_ns_per_page=statistics.median(t.put_ns for t in with_sum) / n_pages,
                    get_ns_per_page=statistics.median(t.get_ns for t in with_sum) / n_pages,
                    get_unchecked_ns_per_page=statistics.median(t.get_ns for t in without)
                    / n_pages,
                )
            )
    return rows


def _store(core: Any, pages: Pages) -> Any:
    result = ffi.new("struct kh_bench_store *")
    given = ffi.from_buffer("char[]", pages)
    check(lib.kh_bench_store(core, given, len(pages), result), "kh_bench_store")
    return result


# -- faults --------------------------------------------------------------------


class _Ours:
    """The kvmhost pager on a separate memory area."""

    def __init__(self, pages: Pages, options: StoreOptions) -> None:
        self.memory = GuestMemory.of_size(pages.nbytes)
        self.memory[0 : pages.nbytes] = pages.tobytes()
        self.address = self.memory.regions[0].guest_address
        self._userfault = Userfault()
        self._pager = Pager(self.memory, self._userfault, options)
        self._gfns = np.arange(len(pages))
        self._pager.arm()

    def evict(self) -> None:
        """Evict all."""
        done = self._pager.evict(self._gfns).count(EvictOutcome.DONE)
        _expect(done, self._gfns.size, "pages evicted")

    def close(self) -> None:
        """Free all."""
        self._pager.close()
        self._userfault.close()
        self.memory.close()


class _Minimal:
    """The minimal C pager on a separate memory area."""

    def __init__(self, pages: Pages) -> None:
        self.memory = GuestMemory.of_size(pages.nbytes)
        self.memory[0 : pages.nbytes] = pages.tobytes()
        region = self.memory.regions[0]
        self.address = region.guest_address
        self._userfault = Userfault()
        # SAFETY: owned here, freed in close() while the mapping is still there.
        self._core = lib.kh_bench_pager_new(
            self._userfault.fd, region.memfd, region.guest_address, region.n_pages
        )
        if self._core == ffi.NULL:
            raise MemoryError("no memory for the minimal pager")

    def evict(self) -> None:
        """Evict all."""
        check(lib.kh_bench_pager_evict(self._core), "kh_bench_pager_evict")

    def close(self) -> None:
        """Free all."""
        lib.kh_bench_pager_free(self._core)
        self._userfault.close()
        self.memory.close()


def run_faults(
    n_pages: int = 8192, rounds: int = 7, content: str = "text", prefetch: int = 0
) -> list[FaultInRow]:
    """Evict all pages and touch them in random order, with each pager in turn.

    :raises CapabilityError: without userfaultfd
    """
    pages = contents(n_pages)[content]
    ways: dict[str, Callable[[], _Ours | _Minimal]] = {"minimal C": lambda: _Minimal(pages)}
    for codec in ("lz4", "zstd", "none"):
        ways[f"pager {codec}"] = functools.partial(_Ours, pages, StoreOptions(codec=codec))
    with temporary_folder("kvmhost-bench-") as folder:
        file = folder / "store"
        ways["pager lz4, file"] = lambda: _Ours(pages, StoreOptions(codec="lz4", path=file))
        if prefetch:
            ahead = StoreOptions(codec="lz4", prefetch_pages=prefetch)
            ways[f"pager lz4, prefetch {prefetch}"] = lambda: _Ours(pages, ahead)
        return _take_turns(ways, n_pages, rounds)


def _take_turns(
    ways: dict[str, Callable[[], _Ours | _Minimal]], n_pages: int, rounds: int
) -> list[FaultInRow]:
    rng = np.random.default_rng(4)
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    for _ in range(rounds):
        order = rng.permutation(n_pages).astype(np.uint32)
        for name, make in ways.items():
            taken[name].append(_one_turn(make(), order))
    figures = {
        name: [statistics.median(column) for column in zip(*turns, strict=True)]
        for name, turns in taken.items()
    }
    minimal_p50, _, minimal_evicted, _ = figures["minimal C"]
    return [
        FaultInRow(
            pager=name,
            p50_ns=p50,
            p99_ns=p99,
            evictions_per_s=evicted,
            scan_ns_per_page=scan,
            p50_of_minimal_ratio=p50 / minimal_p50,
            evictions_of_minimal_ratio=evicted / minimal_evicted,
        )
        for name, (p50, p99, evicted, scan) in figures.items()
    ]


def _one_turn(way: _Ours | _Minimal, order: npt.NDArray[np.uint32]) -> tuple[float, ...]:
    try:
        times = np.zeros(order.size, dtype=np.uint64)
        start = time.perf_counter()
        way.evict()
        evicted = order.size / (time.perf_counter() - start)
        _touch(way.address, order, times)
        p50, p99 = np.percentile(times, [50, 99])
        way.evict()
        _touch(way.address, np.sort(order), times)
        return float(p50), float(p99), evicted, float(times.sum() / order.size)
    finally:
        way.close()


def _touch(address: int, order: npt.NDArray[np.uint32], times: npt.NDArray[np.uint64]) -> None:
    given = ffi.from_buffer("uint32_t[]", order)
    out = ffi.from_buffer("uint64_t[]", times, require_writable=True)
    lib.kh_bench_touch(address, given, order.size, out)


def _expect(seen: int, wanted: int, what: str) -> None:
    if seen != wanted:
        raise RuntimeError(f"{seen} {what}, not {wanted}")


# -- overhead ------------------------------------------------------------------

_CHILD = """
import sys
from kvmhost.tools.bench.pager import overhead_child
from kvmhost.temporary import temporary_folder
overhead_child(int(sys.argv[1]))
"""


def run_overhead(mem_bytes: int = 1 << 30) -> OverheadRow:
    """Return the overhead of a VM process per GiB of guest memory.

    The overhead excludes guest memory and the content of the store. It is the difference
    in private memory of two processes that differ only in the size of guest memory: 64 MiB,
    and ``mem_bytes`` more. The VMM touches all guest memory and evicts half of it (same-filled,
    so that the store holds no content), and one harvest is recorded.

    :raises LayoutError: for less than 1 MiB
    """
    if mem_bytes % (1 << 20) or not mem_bytes:
        raise LayoutError(f"--mem: {mem_bytes} bytes: need a multiple of 1M")
    small, large = (_child(0), _child(mem_bytes))
    gib = mem_bytes / (1 << 30)
    kinds = {kind: (large[kind] - small[kind]) / gib for kind in small}
    return OverheadRow(
        process_base_bytes=small["private"],
        private_bytes_per_gib=kinds["private"],
        page_tables_bytes_per_gib=kinds["page_tables"],
        private_share=kinds["private"] / (1 << 30),
        page_tables_share=kinds["page_tables"] / (1 << 30),
    )


def _child(more_bytes: int) -> dict[str, int]:
    command = [sys.executable, "-c", _CHILD, str((64 << 20) + more_bytes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shown: dict[str, int] = json.loads(done.stdout)
    return shown


def overhead_child(mem_bytes: int) -> None:
    """Measure this process as :func:`run_overhead` describes, and print JSON."""
    from kvmhost.bitmap import YoungBitmap, n_words

    memory = GuestMemory.of_size(mem_bytes)
    userfault = Userfault()
    pager = Pager(memory, userfault, StoreOptions())
    n_pages = memory.n_pages
    pager.arm()
    touched = np.arange(n_pages, dtype=np.uint32)
    times = np.zeros(n_pages, dtype=np.uint64)
    _touch(memory.regions[0].guest_address, touched, times)
    del touched, times
    for start in range(0, n_pages, 4096):
        pager.evict(np.arange(start, min(start + 2048, n_pages)))
    words = np.full(n_words(n_pages), 0xAAAA, dtype=np.uint64)
    pager.note_young(YoungBitmap(0, n_pages, words))
    del words
    status = Path("/proc/self/status").read_text()
    fields = {
        line.partition(":")[0]: int(line.split()[1]) << 10
        for line in status.splitlines()
        if line.startswith(("RssAnon", "VmPTE"))
    }
    shown = {"private": fields["RssAnon"], "page_tables": fields["VmPTE"]}
    sys.stdout.write(json.dumps(shown))
    pager.close()
    userfault.close()
    memory.close()


# -- command -------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Print the figures as tables, or as JSON."""
    options = parser().parse_args(argv)
    result = run(
        options.part,
        n_pages=options.pages,
        rounds=options.rounds,
        content=options.content,
        prefetch=options.prefetch,
        mem_bytes=options.mem,
    )
    if options.json:
        emit(result)
    else:
        _show(result)
    return 0


def run(
    parts: Sequence[str],
    *,
    n_pages: int = 8192,
    rounds: int = 7,
    content: str = "text",
    prefetch: int = 0,
    mem_bytes: int = 1 << 30,
) -> PagerOutput:
    """Run parts.

    :raises CapabilityError: for faults and overhead, without userfaultfd
    """
    codecs: list[CodecRow] = []
    faults: list[FaultInRow] = []
    overhead = None
    if "codecs" in parts:
        with working("bench pager: codecs"):
            codecs = run_codecs(min(n_pages, 2048), rounds)
    if "faults" in parts:
        with working("bench pager: faults"):
            faults = run_faults(n_pages, rounds, content, prefetch)
    if "overhead" in parts:
        with working("bench pager: overhead"):
            overhead = run_overhead(mem_bytes)
    parameters = PagerParameters(
        parts=list(parts),
        n_pages=n_pages,
        rounds=rounds,
        content=content,
        prefetch_pages=prefetch,
        mem_bytes=mem_bytes,
    )
    return PagerOutput(
        **bench_head("pager"),
        parameters=parameters,
        codecs=codecs,
        faults=faults,
        overhead=overhead,
    )


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(prog="kvmhost bench pager", description=about(__doc__))
    add_option(
        parser,
        "--part",
        **listing(one_of("part", PARTS), default=["codecs", "faults"]),
        help="codecs: codecs on several page contents; faults: fault-in latency and evictions; "
        "overhead: memory of a VM process per GiB of guest memory (default: codecs,faults)",
    )
    add_option(parser, "--pages", help="faults: pages that are evicted and touched")
    add_option(parser, "--rounds", default=7, help="measurements of each variant")
    parser.add_argument(
        "--content",
        default="text",
        choices=CONTENTS,
        help="faults: contents of the pages (default: %(default)s)",
    )
    add_option(
        parser, "--prefetch", help="faults: also measure with this many pages of prefetch; 0: not"
    )
    add_option(
        parser, "--mem", default="1G", help="overhead: guest memory that is compared with none"
    )
    add_option(parser, "--json")
    return parser


def _show(result: PagerOutput) -> None:
    if result.codecs:
        print("content   codec  ratio    raw  put ns  get ns  get ns without checksum")
    for row in result.codecs:
        ratio = "same" if row.compression_ratio is None else f"{row.compression_ratio:.2f}"
        print(
            f"{row.content:9} {row.codec:5} {ratio:>6} {row.raw_pages:6} "
            f"{row.put_ns_per_page:7.0f} {row.get_ns_per_page:7.0f} "
            f"{row.get_unchecked_ns_per_page:7.0f}"
        )
    if result.faults:
        print("pager                     p50 us  p99 us  of minimal   evictions/s  scan us/page")
    for one in result.faults:
        print(
            f"{one.pager:24} {one.p50_ns / 1e3:7.1f} {one.p99_ns / 1e3:7.1f} "
            f"{one.p50_of_minimal_ratio:11.2f} {one.evictions_per_s:13.0f} "
            f"{one.scan_ns_per_page / 1e3:13.2f}"
        )
    if result.overhead is not None:
        _show_overhead(result.overhead)


def _show_overhead(row: OverheadRow) -> None:
    print(f"process without guest memory:  {row.process_base_bytes / 1e6:6.1f} MB")
    print(
        f"its own memory, per GiB of guest: {row.private_bytes_per_gib / 1e6:5.2f} MB, "
        f"{row.private_share * 100:.3f} %"
    )
    print(
        f"kernel's page tables for it:    {row.page_tables_bytes_per_gib / 1e6:5.2f} MB, "
        f"{row.page_tables_share * 100:.3f} %"
    )
