"""``kvmhost bench views``: a daemon beside other readers of the same VM, and the cost of a view.

A guest with a hot set and cold touches is under a budget of half of its pages. It stops at
the end of each epoch. A daemon makes a pass every fourth epoch; a record harvests every third, a
live view every second and a heatmap every epoch. Each row is a new VM that runs the same epochs, so
that young pages per pass and refaults may differ only by what the readers take from each other.
The last row is the same with one view for all of them: one accessed bit, and whoever clears it
takes it from the others.

The cost of a view is measured on bitmaps of a 1 GiB guest, a tenth of it young: adding the pages
of a sweep to it, and taking them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvmhost.bitmap import Provenance, YoungBitmap, pack
from kvmhost.control.client import Client
from kvmhost.control.server import ControlServer
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.reclaim.account.events import PassReport
from kvmhost.reclaim.context import DaemonContext
from kvmhost.reclaim.settings.config import load
from kvmhost.reclaim.vm.session import Session
from kvmhost.tools.args import about
from kvmhost.tools.measured import bench_head
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.bench import ViewCost, ViewedRow, ViewsOutput, ViewsParameters
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import Progress
from kvmhost.tools.vocabulary import add_option
from kvmhost.trackers.views import View, ViewKey
from kvmhost.units import Bytes, Mark, MaxShare, Seconds
from kvmhost.vm import Harvest, HarvestRequest
from kvmhost.vm.names import DEFAULT_VIEW

__all__ = ["main", "parser", "run"]

_MEM_BYTES = 32 << 20
_PARAMS = {"pages": 6000, "hot": 1500, "cold": 150, "scan_every": 0, "epochs": 0}
_BUDGET = Mark(size=Bytes(12 << 20))
#: Epochs from one harvest to the next.
_EVERY = {"record": 3, "watch": 2, "heatmap": 1}
_PASS_EVERY = 4
#: Passes before the first one that counts: until then the guest's pages come into being.
_LEARNING = 5
#: Rows: label, readers beside the daemon, whether each has a view of its own.
_ROWS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("alone", (), True),
    ("beside a record", ("record",), True),
    ("beside a live view", ("watch",), True),
    ("beside a record, a live view and a heatmap", ("record", "watch", "heatmap"), True),
    ("the same, with one view for all", ("record", "watch", "heatmap"), False),
)
#: Pages of the guest whose views are measured, and the share of young ones.
_VIEW_PAGES, _YOUNG = (1 << 30) // 4096, 0.1


class _OneView(Client):
    """A client for which all readers are one."""

    def run_harvest(self, asked: HarvestRequest) -> Harvest:
        """Do a harvest of the default view, whatever view was asked for."""
        return super().run_harvest(dataclasses.replace(asked, view=DEFAULT_VIEW))


def run(rounds: int = 40) -> ViewsOutput:
    """Measure.

    :param rounds: passes of the daemon that count, in each row
    """
    progress, rows = Progress(), []
    alone: _Figures | None = None
    for label, readers, own_views in _ROWS:
        progress.say(label)
        found = _measure(readers, own_views, rounds)
        alone = alone or found
        rows.append(
            ViewedRow(
                daemon=label,
                own_views=own_views,
                mean_young_pages=found.mean_young_pages,
                young_of_alone_ratio=_ratio(found.mean_young_pages, alone.mean_young_pages),
                refaulted_pages=found.refaulted_pages,
                refaulted_of_alone_ratio=_ratio(found.refaulted_pages, alone.refaulted_pages),
                sweeps=found.sweeps,
            )
        )
    progress.say("the cost of a view")
    return ViewsOutput(
        **bench_head("views"),
        parameters=ViewsParameters(mem_bytes=_MEM_BYTES, rounds=rounds),
        rows=rows,
        view=_cost_of_a_view(),
    )


def _ratio(value: float, base: float) -> float:
    return value / base if base else 1.0


@dataclasses.dataclass(frozen=True)
class _Figures:
    """What is measured in each row: young pages per pass, and sums."""

    mean_young_pages: float
    refaulted_pages: int
    sweeps: int


def _measure(readers: Sequence[str], own_views: bool, rounds: int) -> _Figures:
    name = f"bench-{os.getpid()}"
    machine = Machine(image_path("hotcold"), mem_bytes=_MEM_BYTES, params=_PARAMS, name=name)
    with machine, ControlServer(machine), (Client if own_views else _OneView)(name) as client:
        machine.step_by_doorbell()
        reports = _run_passes(machine, client, readers, rounds)
        return _Figures(
            statistics.fmean(report.young_pages for report in reports),
            sum(report.refaulted_pages for report in reports),
            client.counters().harvest.sweeps,
        )


def _run_passes(
    machine: Machine, client: Client, readers: Sequence[str], rounds: int
) -> list[PassReport]:
    # No sweep is recent enough for such an interval: an epoch takes longer.
    options: dict[str, dict[str, Any]] = {
        "daemon": {"interval": Seconds(1e-6)},
        # Readers that cost the guest something would make the daemon clear less.
        "defaults": {"budget": _BUDGET, "max_loss": MaxShare(math.inf)},
    }
    context, reports = DaemonContext.of(load(None, options)), []
    with contextlib.closing(context):
        session = Session(client, context)
        for epoch in range(1, _PASS_EVERY * (_LEARNING + rounds) + 1):
            machine.run_epoch()
            for name in readers:
                if epoch % _EVERY[name] == 0:
                    client.harvest(view=name)
            if epoch % _PASS_EVERY == 0:
                reports.append(session.run_pass())
    return reports[_LEARNING:]


def _cost_of_a_view() -> ViewCost:
    """Measure adding to a view and taking from it."""
    rng = np.random.default_rng(1)
    words = pack(rng.random(_VIEW_PAGES) < _YOUNG)
    source = Provenance("bench", "none", 1, 2)
    exact = YoungBitmap(0, _VIEW_PAGES, words, None, source)
    coarse = YoungBitmap(0, _VIEW_PAGES, words, words, source)
    plain, marked = (View(ViewKey(1, "bench"), _VIEW_PAGES, 0) for _ in range(2))
    marked.add(coarse)
    return ViewCost(
        add_ns_per_page=_ns_per_page(lambda: plain.add(exact)),
        take_ns_per_page=_ns_per_page(lambda: _take(plain, exact)),
        add_coarse_ns_per_page=_ns_per_page(lambda: marked.add(coarse)),
        bytes_per_page=plain.n_bytes / _VIEW_PAGES,
        coarse_bytes_per_page=marked.n_bytes / _VIEW_PAGES,
    )


def _take(view: View, found: YoungBitmap) -> None:
    view.merged(found)
    view.take(0, _VIEW_PAGES, None, 3)
    view.add(found)


def _ns_per_page(call: Callable[[], None]) -> float:
    took = []
    for _ in range(200):
        start = time.perf_counter_ns()
        call()
        took.append(time.perf_counter_ns() - start)
    return statistics.median(took) / _VIEW_PAGES


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost bench views",
        description=about(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_option(parser, "--rounds", default=40, help="passes of the daemon in each row")
    add_option(parser, "--json")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the figures as tables, or as JSON."""
    options = parser().parse_args(argv)
    result = run(options.rounds)
    if options.json:
        emit(result)
        return 0
    given = result.parameters
    print(f"guest of {given.mem_bytes >> 20} MiB, {given.rounds} passes of the daemon\n")
    print("| daemon | young pages per pass | of alone | refaults | of alone | sweeps |")
    print("|---|---|---|---|---|---|")
    for row in result.rows:
        print(
            f"| {row.daemon} | {row.mean_young_pages:,.0f} | "
            f"{row.young_of_alone_ratio:.3f} | {row.refaulted_pages:,} | "
            f"{row.refaulted_of_alone_ratio:.3f} | {row.sweeps} |"
        )
    view = result.view
    print(
        f"\na view: {view.add_ns_per_page:.4f} ns per page to add a sweep "
        f"({view.add_coarse_ns_per_page:.4f} with coarse bits), "
        f"{view.take_ns_per_page:.4f} ns to take it, "
        f"{view.bytes_per_page:.3f} bytes per page "
        f"({view.coarse_bytes_per_page:.3f} with coarse bits)"
    )
    return 0
