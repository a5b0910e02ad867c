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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvmhost.bitmap import Provenance, Words, YoungBitmap
from kvmhost.errors import LayoutError
from kvmhost.temporary import temporary_folder
from kvmhost.tools.args import about
from kvmhost.tools.bench.bounds import BOUNDS
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import Progress, show_table
from kvmhost.tools.vocabulary import add_option
from kvmhost.units import PAGE_BYTES

__all__ = ["main", "make_record", "parser", "run"]

_HOT_SHARE, _COLD_TOUCHES = 0.1, 64
_SECOND = 10**9


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


def run(mem_bytes: int, n_windows: int, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure; sizes are in the result.

    :raises LayoutError: for a guest of less than 1 MiB
    """
    if mem_bytes < 1 << 20:
        raise LayoutError(f"--mem: a guest of {mem_bytes} bytes is too small: need 1M or more")
    with temporary_folder("kvmhost-bench-") as place:
        small, large = place / "small", place / "large"
        say(f"1 GiB, {n_windows} windows: being written")
        times = make_record(small, (1 << 30) // PAGE_BYTES, n_windows)
        found: dict[str, Any] = {
            "append_ms": statistics.median(times) * 1e3,
            "append_mean_ms": statistics.fmean(times) * 1e3,
            "append_p99_ms": float(np.percentile(times, 99)) * 1e3,
            "small_mib": _size(small) / 2**20,
        }
        n_pages = mem_bytes // PAGE_BYTES
        say(f"{mem_bytes / 2**30:g} GiB, {n_windows} windows: being written")
        times = make_record(large, n_pages, n_windows)
        found |= {
            "large_mem_bytes": mem_bytes,
            "n_windows": n_windows,
            "large_append_ms": statistics.median(times) * 1e3,
            "large_stored_mib": _size(large) / 2**20,
            "large_bits_gib": n_pages * n_windows / 8 / 2**30,
        }
        for name in ("open", "wss", "bitmap", "hot"):
            say(f"{name} of the large record")
            runs = 1 if name == "hot" else rounds
            results = [_question(name, large) for _ in range(runs)]
            found[f"{name}_s"] = statistics.median(seconds for seconds, _ in results)
            found[f"{name}_rss_mib"] = max(rss for _, rss in results)
        for name in ("heatmap", "html"):
            say(f"{name} of the large record")
            seconds, rss = _question(name, large)
            found |= {f"{name}_s": seconds, f"{name}_rss_mib": rss}
        found["html_mib"] = (place / "large.html").stat().st_size / 2**20
    return found


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _question(name: str, path: Path) -> tuple[float, float]:
    """Run a query in a separate process; return seconds, without the imports, and peak MiB."""
    words = [sys.executable, "-m", "kvmhost.tools.bench.young", "--ask", name, str(path)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    seconds, rss = json.loads(done.stdout)
    return float(seconds), float(rss)


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
    print(json.dumps([seconds, peak_kib / 1024]))


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
        print(json.dumps(found, indent=2))
        return 0
    show_table(
        "records",
        [
            (
                name,
                f"{value:,.3f}"
                + (f" ({BOUNDS[key]})" if (key := f"young.{name}") in BOUNDS else ""),
            )
            for name, value in found.items()
        ],
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
