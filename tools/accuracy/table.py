"""Print the report as tables: boxed on a terminal, Markdown in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvmhost.printable import printable
from kvmhost.tools.outputs.accuracy import (
    AccuracyOutput,
    DoorbellRow,
    PageCostRow,
    RunningRow,
    ThroughputRow,
)

__all__ = ["show"]

_PIPE_WIDTH = 250
#: Columns that contain text.
_WORDS = ("workload", "re-armed")


def show(report: AccuracyOutput) -> None:
    """Print a report of ``run``."""
    on_terminal = sys.stdout.isatty()
    console = Console() if on_terminal else Console(width=_PIPE_WIDTH)
    for title, heads, rows in _tables(report):
        if not rows:
            continue
        table = Table(box=box.ROUNDED if on_terminal else box.MARKDOWN)
        for i, head in enumerate(heads):
            table.add_column(
                head, justify="left" if i < 1 or head in _WORDS else "right", overflow="fold"
            )
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        print(f"\n{title}\n", flush=True)
        if on_terminal:
            console.print(table)
        else:
            # Remove the padding to the full width.
            with console.capture() as capture:
                console.print(table)
            print("\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip()))
    for name, reason in report.missing.items():
        print(f"\nnot measured: {printable(name)}: {printable(reason)}")
    print("\nall exact" if report.exact else "\nNOT EXACT")


def _tables(report: AccuracyOutput) -> Iterable[tuple[str, Sequence[str], list[list[str]]]]:
    at_doorbells = ("tracker", "workload", "re-armed", "precision", "recall", "old after",
                    "new after", "harvest ns/page", "re-arm ns/page")  # fmt: skip
    yield (
        f"At doorbells, {report.n_pages} pages; old and new after: harvests (mean/maximum)",
        at_doorbells,
        [_doorbell_row(row) for row in report.doorbells],
    )
    yield (
        "Running; precision at least/at most, recall of what is certain",
        ("tracker", "workload", "harvests", "certain", "missed", "wrong", "precision", "recall"),
        [_running_row(row) for row in report.running],
    )
    yield (
        f"Cost by page, guest of {report.mem_bytes >> 20} MiB, a tenth of it hot",
        ("tracker", "harvest ns/page", "clear and re-arm ns/young page", "re-fault ns/page"),
        [_cost_row(row) for row in report.cost],
    )
    rates = sorted({row.harvests_per_s for row in report.throughput})
    yield (
        "Throughput of the same guest, % of that without harvests (lowest to highest)",
        ("tracker", "re-armed", *(f"{rate:g} harvests/s" for rate in rates)),
        _throughput_rows(report.throughput, rates, _by_time),
    )
    yield (
        "The same by the vCPU's processor time: not disturbed by others, blind to waiting (uffd)",
        ("tracker", "re-armed", *(f"{rate:g} harvests/s" for rate in rates)),
        _throughput_rows(report.throughput, rates, _by_cpu),
    )


def _doorbell_row(row: DoorbellRow) -> list[str]:
    share = "all" if row.fraction == 1 else f"1/{1 / row.fraction:.0f}"
    shares = ["-", "-"]
    if row.touches or row.reported_pages:
        shares = [f"{row.precision_ratio:.4f}", f"{row.recall_ratio:.4f}"]
    if row.coarse:
        shares[0] += " coarse"
    figures = [f"{row.harvest_ns_per_page:.1f}", f"{row.rearm_ns_per_page:.1f}"]
    stale = [
        _pair(row.mean_old_after_harvests, row.max_old_after_harvests),
        _pair(row.mean_new_after_harvests, row.max_new_after_harvests),
    ]
    return [row.tracker, row.workload, share, *shares, *stale, *figures]


def _running_row(row: RunningRow) -> list[str]:
    precision = f"{row.min_precision_ratio:.3f}/{row.max_precision_ratio:.4f}"
    numbers = (row.harvests, row.certain_pages, row.missed_pages, row.wrong_pages)
    counts = [f"{number:,}" for number in numbers]
    return [row.tracker, row.workload, *counts, precision, f"{row.recall_ratio:.4f}"]


def _cost_row(row: PageCostRow) -> list[str]:
    costs = [f"{row.harvest_ns_per_page:.2f}", f"{row.rearm_ns_per_page:.0f}"]
    return [row.tracker, *costs, f"{row.refault_ns_per_page:.0f}"]


def _throughput_rows(
    rows: list[ThroughputRow], rates: list[float], text: Callable[[ThroughputRow], str]
) -> list[list[str]]:
    shown: dict[tuple[str, str], dict[float, str]] = {}
    for row in rows:
        shown.setdefault((row.tracker, row.rearm), {})[row.harvests_per_s] = text(row)
    return [
        [tracker, rearm, *(cells.get(rate, "-") for rate in rates)]
        for (tracker, rearm), cells in shown.items()
    ]


def _by_time(row: ThroughputRow) -> str:
    text = f"{100 * row.throughput_share:.1f}"
    if row.n_segments == 1:
        return text
    return f"{text} ({100 * row.min_throughput_share:.0f} to {100 * row.max_throughput_share:.0f})"


def _by_cpu(row: ThroughputRow) -> str:
    return f"{100 * row.throughput_by_cpu_share:.1f}"


def _pair(mean: float | None, most: int | None) -> str:
    return "-" if mean is None else f"{mean:.2f}/{most}"
