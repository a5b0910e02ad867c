"""``kvmhost young whatif``: replay records through policies with many parameters."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.tools.args import size_bytes
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.young.common import progress_bar
from kvmhost.tools.young.output import (
    Table,
    add_output_arguments,
    coverage_facts,
    mib,
    open_record,
    show,
    window_range,
)

if TYPE_CHECKING:
    from kvmhost.reclaim.analyse.whatif import Case, Outcome
    from kvmhost.reclaim.record.reader import YoungRecord
    from kvmhost.tools.young.realrun import ErrorBar

from kvmhost.vm.names import ENGINES

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from kvmhost.reclaim.analyse.whatif import cases_of, has_dask
    from kvmhost.tools.young.realrun import measure_error

    budgets = [_budget(word) for word in _words(args.budget)]
    policies = _words(args.policy)
    grid = _grid(args.set)
    for path in args.files:
        open_record(path).close()  # reports a missing end
    cases = cases_of(args.files, policies, budgets, grid, args.windows or (None, None))
    workers = args.workers
    if workers is None and args.scheduler is None and not has_dask():
        print("Dask is not installed: replaying in this process", file=sys.stderr)
        workers = 0
    outcomes = _replay(cases, workers, args.scheduler)
    bars = {}
    if args.check:
        with progress_bar(len(policies), "real runs") as advance:
            for policy in policies:
                bars[policy] = measure_error(policy, engine=args.engine)
                advance()
    _show(outcomes, bars, args)
    return 0


def _replay(cases: Sequence[Case], workers: int | None, scheduler: str | None) -> list[Outcome]:
    """Replay all cases; in this process if the number of workers is open and none starts.

    :raises CapabilityError: if the workers that were asked for do not start
    """
    from kvmhost.reclaim.analyse.whatif import run_cases

    try:
        with progress_bar(len(cases), "replaying") as advance:
            return run_cases(cases, workers=workers, scheduler=scheduler, on_done=advance)
    except CapabilityError as error:
        if workers is not None or scheduler is not None:
            raise
        text = f"{error.needed}, {error.found}".replace(", which", "")
        print(f"kvmhost young whatif: {text}: replaying in this process", file=sys.stderr)
    with progress_bar(len(cases), "replaying") as advance:
        return run_cases(cases, workers=0, on_done=advance)


def _show(outcomes: Sequence[Outcome], bars: dict[str, ErrorBar], args: argparse.Namespace) -> None:
    several = len({o.case.path for o in outcomes}) > 1
    rows: list[list[Any]] = []
    remarks: set[str] = set()
    for outcome in outcomes:
        bar = bars.get(outcome.case.policy)
        low, high = (None, None) if bar is None else bar.around(outcome.refaults_per_min)
        with open_record(outcome.case.path) as record:
            page_bytes = record.metadata.page_bytes
            end = len(record) if outcome.case.end is None else outcome.case.end
            covered, said = coverage_facts(record, outcome.case.first, end)
            remarks |= {f"{outcome.case.path.name}: {text}" for text in said}
        rows.append(
            [
                *([outcome.case.path.name] if several else []),
                outcome.case.settings(),
                round(mib(outcome.case.budget_pages, page_bytes), 3),
                outcome.refaults,
                round(outcome.refaults_per_min, 3),
                low,
                high,
                round(outcome.refault_share, 6),
                round(mib(outcome.saved_pages, page_bytes), 3),
                round(outcome.saved_share, 6),
                round(outcome.wrong_share, 6),
                covered["covered_share"],
            ]
        )
    names = [
        *(["record"] if several else []),
        "policy", "budget_mib", "refaults", "a_minute", "low", "high", "of_touches",
        "saved_mib", "saved", "wrong", "covered",
    ]  # fmt: skip
    facts = {f"error_{name}": dataclasses.asdict(bar) for name, bar in bars.items()}
    notes = [
        "refaults: predicted; of_touches: share of the touches that would have waited for one;",
        "saved: touched so far and not resident, mean; wrong: evictions undone within four windows",
    ]
    notes += sorted(remarks)
    notes += [bar.line(name) for name, bar in bars.items()]
    if not bars:
        notes.append("no error bar was measured (--no-check)")
    formats = {"of_touches": "%", "saved": "%", "wrong": "%", "covered": "%"}
    show(Table(names, rows, facts, notes=notes, formats=formats), args)


def _words(text: str) -> list[str]:
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise LayoutError(f"{text!r} names nothing")
    return found


def _budget(word: str) -> Callable[[YoungRecord], int]:
    """Parse ``64M``, or ``50%`` of the pages ever touched, into a function of a record."""
    if word.endswith("%"):
        try:
            share = float(word[:-1]) / 100
        except ValueError:
            share = 0.0
        if not 0 < share <= 10:
            raise LayoutError(f"--budget {word!r}: write 64M, or 50% of all that was touched")
        return lambda record: int(share * record.between(0, None, "or").count())
    try:
        n_bytes = size_bytes(word)
    except argparse.ArgumentTypeError as error:
        raise LayoutError(f"--budget: {error}") from None
    return lambda record: n_bytes // record.metadata.page_bytes


def _grid(words: Sequence[str]) -> dict[str, list[Any]]:
    """Parse ``n_generations=4,6`` into values by option."""
    grid: dict[str, list[Any]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not name or not equals or not values:
            raise LayoutError(f"--set {word!r}: write for example n_generations=4,6,8")
        grid[name] = [_value(value) for value in values.split(",")]
    return grid


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young whatif",
        description="Replay records through policies under budgets and show what refaults and "
        "savings they predict, with an error bar: the same prediction is made for a guest that "
        "is then really run under the policy on this machine, and the worst ratio counts.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="records")
    parser.add_argument(
        "--policy", default="lru_gen", metavar="NAME,...", help="policies (default: lru_gen)"
    )
    parser.add_argument(
        "--budget", required=True, metavar="SIZE,...",
        help="resident memory: 64M,96M, or 25%%,50%% of all that was touched",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=V,V",
        help="values of an option of the policies; several: all combinations",
    )  # fmt: skip
    parser.add_argument(
        "--windows", type=window_range, metavar="A:B", help="from window A up to before B"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N",
        help="processes (default: one per core, or this process without Dask; 0: this process)",
    )  # fmt: skip
    parser.add_argument(
        "--scheduler", metavar="ADDRESS",
        help="run on this Dask cluster, for example tcp://host:8786; it needs the same paths",
    )  # fmt: skip
    parser.add_argument(
        "--check", action=argparse.BooleanOptionalAction, default=True,
        help="measure the error bar by real runs, a few seconds a policy (default: on)",
    )  # fmt: skip
    parser.add_argument("--engine", default="auto", choices=ENGINES, help="of the real runs")
    add_output_arguments(parser)
    return parser
