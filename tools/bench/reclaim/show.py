"""Show the figures as tables and as a plot."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvmhost.files import check_target, replacing
from kvmhost.tools.terminal import unfiltered

__all__ = ["need_file", "plot", "progress", "tables"]

Row = Mapping[str, Any]


def progress(text: str) -> None:
    """Show on a terminal what is being measured."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=unfiltered(sys.stderr), flush=True)


def need_file(path: Path) -> None:
    """Check that the plot can be written, before anything is measured.

    :raises HostError: if no file can be written at ``path``
    :raises CapabilityError: without matplotlib
    """
    from kvmhost.reclaim.draw.render import need_plotting

    need_plotting()
    check_target(path)


def tables(report: Mapping[str, Sequence[Row]]) -> str:
    """Return every part as a table."""
    progress("")
    shown = []
    if "trace" in report:
        shown.append("trace: refaults, as multiples of Belady's; wrong evictions in brackets")
        shown.append(_trace_table(report["trace"]))
    if "guests" in report:
        shown.append(
            "guests: throughput of that without limit; faults an epoch; pages that came back, of "
            "those Belady's optimum needs in the recorded windows; processor time a pass"
        )
        shown.append(_guests_table(report["guests"]))
    if "cost" in report:
        shown.append("cost of one pass a second, percent of a core a GiB of guest")
        shown.append(
            _table(
                ("policy", "GiB", "all", "policy", "harvest"),
                (
                    (
                        row["policy"],
                        f"{row['guest_gib']:.2f}",
                        f"{row['busy_percent_per_gib']:.2f}",
                        f"{row['policy_percent_per_gib']:.2f}",
                        f"{row['harvest_percent_per_gib']:.2f}",
                    )
                    for row in report["cost"]
                ),
            )
        )
    if "rows" in report:
        shown.append("second pass over memory under a limit of half of it")
        shown.append(
            _table(
                ("aging", "seconds", "of batched", "faulted in"),
                (
                    (
                        row["way"],
                        f"{row['second_pass_s']:.3f}",
                        f"{row['of_batched']:.2f}",
                        f"{row['faulted_in']:,.0f}",
                    )
                    for row in report["rows"]
                ),
            )
        )
    return "\n".join(shown)


def _trace_table(rows: Sequence[Row]) -> str:
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    by_case: dict[tuple[str, float], dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault((row["workload"], row["budget"]), {})[row["policy"]] = row
    lines = []
    for (workload, budget), found in by_case.items():
        cells = [f"{found['belady']['refaults']:,}"]
        cells += [
            f"{found[p]['of_belady']:.2f} ({found[p]['wrong_evictions']:,})" for p in policies[1:]
        ]
        lines.append((workload, f"{budget:.0%}", *cells))
    return _table(("workload", "budget", *policies), lines)


def _guests_table(rows: Sequence[Row]) -> str:
    return _table(
        (
            "workload",
            "budget",
            "policy",
            "throughput",
            "faults/epoch",
            "came back",
            "Belady",
            "wrong",
            "ms/pass",
        ),
        (
            (
                row["workload"],
                f"{row['budget']:.0%}",
                row["policy"],
                f"{row['throughput_of_no_limit']:.3f}",
                f"{row['faults_in_per_epoch']:.1f}",
                f"{row['refaulted_pages']:,}",
                "-" if row["belady_refaults"] is None else f"{row['belady_refaults']:,}",
                f"{row['wrong_evictions']:,}",
                f"{row['busy_ms_per_pass']:.1f}",
            )
            for row in rows
        ),
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    every = [tuple(head), *map(tuple, rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in every]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def plot(report: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Plot refaults as multiples of Belady's, and throughput if guests were run."""
    from matplotlib.figure import Figure

    parts = [part for part in ("trace", "guests") if part in report]
    figure = Figure(figsize=(11, 4.2 * len(parts)), layout="constrained")
    axes = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
    for axis, part in zip(axes, parts, strict=True):
        # The ranking is meaningful only for stationary traces; elsewhere it is off the scale.
        rows = [row for row in report[part] if row["policy"] not in ("belady", "ranking")]
        value = "of_belady" if part == "trace" else "throughput_of_no_limit"
        _bars(axis, rows, value)
        if part == "trace":
            axis.axhline(1, color="black", linewidth=1)
            axis.set(ylabel="refaults of Belady's", title="trace: refaults, lower is better")
        else:
            axis.set(ylabel="of no limit", title="guests: throughput, higher is better")
    axes[0].legend(fontsize="small", ncols=6, loc="upper left")
    with replacing(path, mode=0o666) as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=110)


def _bars(axis: Any, rows: Sequence[Row], value: str) -> None:
    cases = list(dict.fromkeys((row["workload"], row["budget"]) for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    width = 0.84 / len(policies)
    for number, policy in enumerate(policies):
        places, heights = [], []
        for row in rows:
            if row["policy"] == policy:
                place = cases.index((row["workload"], row["budget"]))
                places.append(place + (number - len(policies) / 2 + 0.5) * width)
                heights.append(row[value])
        axis.bar(places, heights, width, label=policy)
    labels = [f"{workload.replace('-', '-' + chr(10))}\n{budget:.0%}" for workload, budget in cases]
    axis.set_xticks(range(len(cases)), labels, fontsize=7)
    axis.set_xlim(-0.6, len(cases) - 0.4)
