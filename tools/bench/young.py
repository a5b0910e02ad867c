"""``kvmhost bench young``: the cost of writing, opening and querying records.

Two synthetic guests have a hot set of a tenth of their pages, of which each window
touches half, and some cold touches. A record of a 1 GiB guest is appended window by
window; the queries are timed on a record of a 64 GiB guest over one hour, with one
window per second. Every time is the median of several rounds. The record of the large
guest is written first, which takes minutes; ``--mem`` and ``--count`` make it smaller.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kvmhost.bitmap import Provenance, Words, YoungBitmap
from kvmhost.errors import LayoutError
from kvmhost.temporary import temporary_folder
from kvmhost.tools.args import about
from kvmhost.tools.bench.bounds import BOUNDS
from kvmhost.tools.measured import bench_head
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.bench import (
    QueryName,
    QueryRow,
    RecordRow,
    YoungOutput,
    YoungParameters,
)
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import Progress, show_table
from kvmhost.tools.vocabulary import add_option
from kvmhost.units import PAGE_BYTES

__all__ = ["main", "make_record", "parser", "run"]

_HOT_SHARE, _COLD_TOUCHES = 0.1, 64
_SECOND = 10**9
#: Queries that are timed once.
_SLOW: tuple[QueryName, ...] = ("hot", "heatmap", "html")


def make_windows(n_pages: int, n_variants: int = 16, seed: int = 1) -> list[Words]:
    """Return bitmaps of a guest with a contiguous hot set, half of it touched per window."""
    rng = np.random.default_rng(seed)
    hot_words = max(int(n_pages * _HOT_SHARE) // 64, 1)
    first = n_pages // 64 // 3
    found = []
    for _ in range(n_variants):
        words = np.zeros(n_pages // 64, dtype=np.uint64)
        words[first : first + hot_words] = rng.integers(0, 1 << 64, hot_words, dtype=np.uint64)
        cold = rng.integers(0, n_pages, _COLD_TOUCHES)
        np.bitwise_or.at(words, cold // 64, np.uint64(1) << (cold % 64).astype(np.uint64))
        found.append(words)
    return found


def make_record(path: Path, n_pages: int, n_windows: int) -> list[float]:
    """Write a record; return the seconds that each append took."""
    from kvmhost.reclaim.record.writer import RecordWriter

    windows, times = make_windows(n_pages, 61), []
    with RecordWriter.create(path, n_pages, name="bench") as writer:
        for number in range(n_windows):
            source = Provenance("bench", "npt", number * _SECOND, (number + 1) * _SECOND)
            bitmap = YoungBitmap(0, n_pages, windows[number % len(windows)], None, source)
            start = time.perf_counter()
            writer.append(bitmap)
            times.append(time.perf_counter() - start)
    return times


def run(mem_bytes: int, n_windows: int, rounds: int, say: Callable[[str], None]) -> YoungOutput:
    """Measure.

    :raises LayoutError: for a guest of less than 1 MiB
    """
    if mem_bytes < 1 << 20:
        raise LayoutError(f"--mem: a guest of {mem_bytes} bytes is too small: need 1M or more")
    with temporary_folder("kvmhost-bench-") as place:
        small, large = place / "small", place / "large"
        records = [
            _record_row(small, 1 << 30, n_windows, say),
            _record_row(large, mem_bytes, n_windows, say),
        ]
        queries = []
        for name in typing.get_args(QueryName):
            say(f"{name} of the large record")
            queries.append(_query_row(name, large, 1 if name in _SLOW else rounds))
        html_bytes = (place / "large.html").stat().st_size
    parameters = YoungParameters(mem_bytes=mem_bytes, n_windows=n_windows, rounds=rounds)
    return YoungOutput(
        **bench_head("young"),
        parameters=parameters,
        records=records,
        queries=queries,
        html_bytes=html_bytes,
    )


def _record_row(
    path: Path, mem_bytes: int, n_windows: int, say: Callable[[str], None]
) -> RecordRow:
    say(f"{mem_bytes / 2**30:g} GiB, {n_windows} windows: being written")
    n_pages = mem_bytes // PAGE_BYTES
    times = make_record(path, n_pages, n_windows)
    return RecordRow(
        mem_bytes=mem_bytes,
        append_ms=statistics.median(times) * 1e3,
        mean_append_ms=statistics.fmean(times) * 1e3,
        p99_append_ms=float(np.percentile(times, 99)) * 1e3,
        stored_bytes=_size(path),
        bits_bytes=n_pages * n_windows // 8,
    )


def _query_row(name: QueryName, path: Path, times: int) -> QueryRow:
    results = [_question(name, path) for _ in range(times)]
    return QueryRow(
        query=name,
        median_s=statistics.median(seconds for seconds, _ in results),
        peak_rss_bytes=max(rss for _, rss in results),
    )


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _question(name: QueryName, path: Path) -> tuple[float, int]:
    """Run a query in a separate process; return seconds, without the imports, and peak bytes."""
    words = [sys.executable, "-m", "kvmhost.tools.bench.young", "--ask", name, str(path)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    seconds, rss = json.loads(done.stdout)
    return float(seconds), int(rss)


def _ask(name: str, path: Path) -> None:
    from kvmhost.reclaim.analyse.analysis import histograms, working_set
    from kvmhost.reclaim.analyse.patterns import hot_ranges
    from kvmhost.reclaim.draw.heatmapdata import RecordView, heatmap_of
    from kvmhost.reclaim.draw.heatmaphtml import write_html
    from kvmhost.reclaim.draw.render import render_heatmap
    from kvmhost.reclaim.record.reader import YoungRecord

    if name == "heatmap":
        import matplotlib.figure  # noqa: F401  # imported before the clock starts
    start = time.perf_counter()
    with YoungRecord.open(path) as record:
        if name == "wss":
            found = histograms(record)
            for windows in (1, 10, 60, 600):
                working_set(found, windows)
        elif name == "bitmap":
            record.bitmap(len(record) // 2)
        elif name == "hot":
            hot_ranges(record, min_share=0.3, max_gap_pages=64)
        elif name == "heatmap":
            render_heatmap(heatmap_of(RecordView(record)), path.parent / "large.png")
        elif name == "html":
            with (path.parent / "large.html").open("wb") as file:
                write_html(RecordView(record), file)
    seconds = time.perf_counter() - start
    # Not ru_maxrss: it starts at the parent's value at the time of the fork.
    status = Path("/proc/self/status").read_text()
    peak_kib = next(int(li.split()[1]) for li in status.splitlines() if li.startswith("VmHWM"))
    print(json.dumps([seconds, peak_kib * 1024]))


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(prog="kvmhost bench young", description=about(__doc__))
    add_option(parser, "--mem", default="64G", help="memory of the large guest")
    add_option(parser, "--count", default=3600, help="windows of each record")
    add_option(parser, "--rounds", default=5, help="repetitions of each query")
    add_option(parser, "--json")
    parser.add_argument("--ask", nargs=2, metavar=("QUESTION", "FILE"), help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures as a table, or as JSON."""
    args = parser().parse_args(argv)
    if args.ask:
        _ask(args.ask[0], Path(args.ask[1]))
        return 0
    found = run(args.mem, args.count, args.rounds, Progress().say)
    if args.json:
        emit(found)
    else:
        show_table("records", list(_rows(found)))
    return 0


def _rows(found: YoungOutput) -> Iterator[tuple[str, str]]:
    for row in found.records:
        small = row is found.records[0]
        size = f"{row.mem_bytes / 2**30:g} GiB"
        yield (
            f"append, {size}",
            f"{row.append_ms:,.3f} ms{_bound('append_ms', small)}, mean {row.mean_append_ms:,.3f}, "
            f"99 % within {row.p99_append_ms:,.3f}",
        )
        yield (
            f"stored, {size}",
            f"{row.stored_bytes / 2**20:,.1f} MiB{_bound('stored_bytes', small)}, "
            f"{row.bits_bytes / 2**20:,.0f} MiB as bits",
        )
    for query in found.queries:
        rss = f"{query.peak_rss_bytes / 2**20:,.0f} MiB resident"
        yield (
            query.query,
            f"{query.median_s:,.3f} s{_bound(f'{query.query}_s')}, "
            f"{rss}{_bound(f'{query.query}_peak_rss_bytes')}",
        )
    yield "size of the html", f"{found.html_bytes / 2**20:,.1f} MiB"


def _bound(figure: str, there: bool = True) -> str:
    key = f"young.{figure}"
    return f" ({BOUNDS[key]})" if there and key in BOUNDS else ""


if __name__ == "__main__":
    raise SystemExit(main())
