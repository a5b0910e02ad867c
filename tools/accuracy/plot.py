"""Plot the report: exactness, staleness, cost per page, throughput."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvmhost.files import replacing
from kvmhost.tools.outputs.accuracy import AccuracyOutput

__all__ = ["draw"]

#: Colour of each tracker, from the colour-blind safe palette of Okabe and Ito.
_COLORS = {
    "guestpt": "#0072B2",
    "pagemap": "#E69F00",
    "dirty": "#009E73",
    "uffd": "#D55E00",
    "idle": "#56B4E9",
    "dirty-ring": "#CC79A7",
}
_COSTS = (
    ("harvest_ns_per_page", "harvest, a page of memory", "#9ecae1"),
    ("rearm_ns_per_page", "clear and re-arm, a young page", "#4292c6"),
    ("refault_ns_per_page", "the guest's fault, a re-armed page", "#084594"),
)
_RIGHT, _WRONG = "#e5f5e0", "#fcbba1"


def draw(report: AccuracyOutput, path: Path) -> None:
    """Draw a report of ``run`` into a PNG file.

    :raises HostError: if the file cannot be written
    """
    from matplotlib.figure import Figure

    costly = bool(report.cost)
    figure = Figure(figsize=(14, 9.5 if costly else 5), dpi=110, layout="constrained")
    rows = figure.subplots(2 if costly else 1, 2, squeeze=False, width_ratios=[3, 2])
    figure.suptitle("Trackers of accessed guest pages: accuracy, staleness, cost", fontsize=15)
    _draw_exactness(rows[0][0], report)
    _draw_staleness(rows[0][1], report)
    if costly:
        _draw_throughput(rows[1][0], report)
        _draw_costs(rows[1][1], report)
    with replacing(path, mode=0o666) as file:
        figure.savefig(file, format="png")


def _names(report: AccuracyOutput) -> list[str]:
    return list(dict.fromkeys(row.tracker for row in report.doorbells))


def _draw_exactness(axes: Any, report: AccuracyOutput) -> None:
    """Draw one cell per tracker and workload: precision above recall."""
    names = _names(report)
    exact = [row for row in report.doorbells if row.fraction == 1]
    workloads = list(dict.fromkeys(row.workload for row in exact))
    for row in exact:
        x, y = workloads.index(row.workload), names.index(row.tracker)
        right = row.precision_ratio == row.recall_ratio == 1.0
        axes.add_patch(_cell(x, y, _RIGHT if right else _WRONG))
        text = f"{_short(row.precision_ratio)}\n{_short(row.recall_ratio)}"
        if not row.touches and not row.reported_pages:
            text = "nothing\nwritten"
        axes.text(x, y, text, ha="center", va="center", fontsize=9 if "1" in text else 7)
    axes.set_xlim(-0.5, len(workloads) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xticks(range(len(workloads)), workloads, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Precision over recall, a harvest at each doorbell (every page cleared)")


def _cell(x: int, y: int, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=color)


def _short(value: float) -> str:
    return "1.0" if value == 1.0 else f"{min(value, 0.999):.3f}"


def _draw_staleness(axes: Any, report: AccuracyOutput) -> None:
    """Draw the mean and maximum number of harvests until a page reads as old."""
    names, period = _names(report), round(1 / report.fraction)
    groups = [(1, "every page cleared", "#4292c6")]
    if period > 1:
        groups.append((period, f"one page in {period} cleared", "#fd8d3c"))
    width = 0.8 / len(groups)
    for i, (of, label, color) in enumerate(groups):
        rows = [r for r in report.doorbells if round(1 / r.fraction) == of]
        by_name = [[r for r in rows if r.tracker == name] for name in names]
        means = [_mean([r.mean_old_after_harvests or 0 for r in some]) for some in by_name]
        most = [max((r.max_old_after_harvests or 0 for r in some), default=0) for some in by_name]
        places = np.arange(len(names)) + (i - (len(groups) - 1) / 2) * width
        axes.bar(places, means, width * 0.9, label=f"{label}: mean", color=color)
        axes.plot(places, most, "_", color="black", markersize=14, label="longest" if not i else "")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, max(period, 1) * 1.3)
    axes.set(ylabel="harvests", title="Until an untouched page reads as old")
    axes.legend(loc="upper left", ncols=2, frameon=False, fontsize=9)
    _plain(axes)


def _mean(waits: list[float]) -> float:
    """Return the mean of the waits above 0; 0 without any."""
    found = [wait for wait in waits if wait]
    return float(np.mean(found)) if found else 0.0


def _draw_throughput(axes: Any, report: AccuracyOutput) -> None:
    """Draw one line per tracker, dashed where only a sample is re-armed."""
    period = round(1 / report.fraction)
    rates = sorted({row.harvests_per_s for row in report.throughput})
    styles = {"young": "-", "all": ":"}
    for name in _names(report):
        for rearm in ("young", "all", f"1/{period}"):
            rows = [r for r in report.throughput if (r.tracker, r.rearm) == (name, rearm)]
            rows.sort(key=lambda row: rates.index(row.harvests_per_s))
            if not rows:
                continue
            places = [rates.index(r.harvests_per_s) for r in rows]
            kept = [100 * r.throughput_share for r in rows]
            label = {"young": name, "all": f"{name}, all re-armed"}.get(rearm, "")
            axes.plot(
                places,
                kept,
                styles.get(rearm, "--"),
                marker="o",
                color=_COLORS[name],
                label=label,
            )
    if period > 1:
        axes.plot([], [], "--", color="gray", label=f"one page in {period} re-armed")
    axes.axhline(100, color="gray", linewidth=0.8)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="harvests a second", ylabel="% of throughput without harvests")
    axes.set_title(
        f"What the guest keeps: {report.mem_bytes >> 20} MiB, a tenth of it touched in a loop"
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False, fontsize=9)
    _plain(axes)


def _draw_costs(axes: Any, report: AccuracyOutput) -> None:
    names = [row.tracker for row in report.cost]
    for i, (column, label, color) in enumerate(_COSTS):
        places = np.arange(len(names)) + (i - 1) * 0.26
        values = [max(getattr(row, column), 0.01) for row in report.cost]
        bars = axes.barh(places, values, 0.24, label=label, color=color)
        shown = [f"{value:,.2f}" if value < 10 else f"{value:,.0f}" for value in values]
        axes.bar_label(bars, shown, padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(0.1, max(row.refault_ns_per_page for row in report.cost) * 30)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="ns (log)", title="Cost by page")
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.42, -0.14), ncols=1, frameon=False, fontsize=9
    )
    _plain(axes, "x")


def _plain(axes: Any, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
