"""Show the figures as tables and as a plot."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvmhost.files import check_target, replacing
from kvmhost.tools.outputs.benchparts import LimitedGuestRow, ReclaimOutput, TraceRow
from kvmhost.tools.terminal import unfiltered

__all__ = ["need_file", "plot", "progress", "tables"]


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


def tables(report: ReclaimOutput) -> str:
    """Return every part as a table."""
    progress("")
    shown = []
    if report.trace:
        shown.append("trace: refaults, as multiples of Belady's; wrong evictions in brackets")
        shown.append(_trace_table(report.trace))
    if report.guests:
        shown.append(
            "guests: throughput of that without limit; faults an epoch; pages that came back, of "
            "those Belady's optimum needs in the recorded windows; processor time a pass"
        )
        shown.append(_guests_table(report.guests))
    if report.cost:
        shown.append("cost of one pass a second, percent of a core a GiB of guest")
        shown.append(
            _table(
                ("policy", "GiB", "all", "policy", "harvest"),
                (
                    (
                        row.policy,
                        f"{row.guest_gib:.2f}",
                        f"{row.busy_percent_per_gib:.2f}",
                        f"{row.policy_percent_per_gib:.2f}",
                        f"{row.harvest_percent_per_gib:.2f}",
                    )
                    for row in report.cost
                ),
            )
        )
    if report.rows:
        shown.append("second pass over memory under a limit of half of it")
        shown.append(
            _table(
                (
                    "aging",
                    "seconds",
                    "of batched",
                    "tests s",
                    "re-arm s",
                    "single tests",
                    "flushes",
                    "faulted in",
                ),
                (
                    (
                        row.aging,
                        f"{row.second_pass_s:.3f}",
                        f"{row.of_batched_ratio:.2f}",
                        f"{row.test_s:.3f}",
                        f"{row.rearm_s:.3f}",
                        f"{row.n_single_tests:,}",
                        f"{row.n_flush_requests:,}",
                        f"{row.fault_ins:,.0f}",
                    )
                    for row in report.rows
                ),
            )
        )
    return "\n".join(shown)


def _trace_table(rows: Sequence[TraceRow]) -> str:
    policies = list(dict.fromkeys(row.policy for row in rows))
    by_case: dict[tuple[str, float], dict[str, TraceRow]] = {}
    for row in rows:
        by_case.setdefault((row.workload, row.budget_share), {})[row.policy] = row
    lines = []
    for (workload, budget), found in by_case.items():
        cells = [f"{found['belady'].refaults:,}"]
        cells += [
            f"{found[p].refaults_of_belady_ratio:.2f} ({found[p].wrong_evictions:,})"
            for p in policies[1:]
        ]
        lines.append((workload, f"{budget:.0%}", *cells))
    return _table(("workload", "budget", *policies), lines)


def _guests_table(rows: Sequence[LimitedGuestRow]) -> str:
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
                row.workload,
                f"{row.budget_share:.0%}",
                row.policy,
                f"{row.throughput_of_no_limit_ratio:.3f}",
                f"{row.fault_ins_per_epoch:.1f}",
                f"{row.refaulted_pages:,}",
                "-" if row.belady_refaults is None else f"{row.belady_refaults:,}",
                f"{row.wrong_evictions:,}",
                f"{row.busy_ms_per_pass:.1f}",
            )
            for row in rows
        ),
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    every = [tuple(head), *map(tuple, rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in every]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def plot(report: ReclaimOutput, path: Path) -> None:
    """Plot refaults as multiples of Belady's, and throughput if guests were run."""
    from matplotlib.figure import Figure

    # The ranking is meaningful only for stationary traces; elsewhere it is off the scale.
    trace = [
        (row.workload, row.budget_share, row.policy, row.refaults_of_belady_ratio)
        for row in report.trace
        if row.policy not in ("belady", "ranking")
    ]
    guests = [
        (row.workload, row.budget_share, row.policy, row.throughput_of_no_limit_ratio)
        for row in report.guests
    ]
    n_parts = bool(trace) + bool(guests)
    figure = Figure(figsize=(11, 4.2 * n_parts), layout="constrained")
    axes = figure.subplots(n_parts, 1, squeeze=False)[:, 0]
    if trace:
        _bars(axes[0], trace)
        axes[0].axhline(1, color="black", linewidth=1)
        axes[0].set(ylabel="refaults of Belady's", title="trace: refaults, lower is better")
    if guests:
        _bars(axes[-1], guests)
        axes[-1].set(ylabel="of no limit", title="guests: throughput, higher is better")
    axes[0].legend(fontsize="small", ncols=6, loc="upper left")
    with replacing(path, mode=0o666) as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=110)


def _bars(axis: Any, rows: Sequence[tuple[str, float, str, float]]) -> None:
    """Draw (workload, budget, policy, value) as one bar per policy."""
    cases = list(dict.fromkeys((workload, budget) for workload, budget, _, _ in rows))
    policies = list(dict.fromkeys(policy for _, _, policy, _ in rows))
    width = 0.84 / len(policies)
    for number, policy in enumerate(policies):
        of_policy = [row for row in rows if row[2] == policy]
        offset = (number - len(policies) / 2 + 0.5) * width
        places = [cases.index((workload, budget)) + offset for workload, budget, _, _ in of_policy]
        axis.bar(places, [value for *_, value in of_policy], width, label=policy)
    labels = [f"{workload.replace('-', '-' + chr(10))}\n{budget:.0%}" for workload, budget in cases]
    axis.set_xticks(range(len(cases)), labels, fontsize=7)
    axis.set_xlim(-0.6, len(cases) - 0.4)
