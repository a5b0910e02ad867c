"""``kvmhost young whatif``: replay records through policies with many parameters."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.tools.args import mark, number
from kvmhost.tools.outputs.records import CaseRow, ErrorBarRow, RealRunRow, WhatifOutput
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option, listing
from kvmhost.tools.young.common import progress_bar
from kvmhost.tools.young.output import (
    Table,
    add_output_arguments,
    coverage_facts,
    mib,
    open_record,
    show,
)
from kvmhost.units import Mark

if TYPE_CHECKING:
    from kvmhost.reclaim.analyse.whatif import Case, Outcome
    from kvmhost.reclaim.record.reader import YoungRecord
    from kvmhost.tools.young.realrun import ErrorBar


__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from kvmhost.reclaim.analyse.whatif import cases_of, has_dask
    from kvmhost.tools.young.realrun import measure_error

    budgets, policies = [_budget(given) for given in args.budget], args.policy
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
    output = WhatifOutput(
        cases=[_case(outcome, bars.get(outcome.case.policy)) for outcome in outcomes],
        error_bars=[_error_bar(name, bar) for name, bar in bars.items()],
    )
    several = len({o.case.path for o in outcomes}) > 1
    rows: list[list[Any]] = []
    remarks: set[str] = set()
    for outcome, row in zip(outcomes, output.cases, strict=True):
        with open_record(outcome.case.path) as record:
            page_bytes = record.metadata.page_bytes
            _, said = _coverage(record, outcome)
            remarks |= {f"{outcome.case.path.name}: {text}" for text in said}
        rows.append(
            [
                *([outcome.case.path.name] if several else []),
                outcome.case.settings(),
                round(mib(row.budget_pages, page_bytes), 3),
                row.refaults,
                row.refaults_per_minute,
                row.low_refaults_per_minute,
                row.high_refaults_per_minute,
                row.refault_share,
                round(mib(row.saved_pages, page_bytes), 3),
                row.saved_share,
                row.wrong_share,
                row.covered_share,
            ]
        )
    names = [
        *(["record"] if several else []),
        "policy", "budget_mib", "refaults", "per_minute", "low", "high", "of_touches",
        "saved_mib", "saved", "wrong", "covered",
    ]  # fmt: skip
    notes = [
        "refaults: predicted; of_touches: share of the touches that would have waited for one;",
        "saved: touched so far and not resident, mean; wrong: evictions undone within four windows",
    ]
    notes += sorted(remarks)
    notes += [bar.line(name) for name, bar in bars.items()]
    if not bars:
        notes.append("no error bar was measured (--no-check)")
    formats = {"of_touches": "%", "saved": "%", "wrong": "%", "covered": "%"}
    show(output, Table(names, rows, notes=notes, formats=formats), args)


def _coverage(record: YoungRecord, outcome: Outcome) -> tuple[dict[str, Any], list[str]]:
    end = len(record) if outcome.case.end is None else outcome.case.end
    return coverage_facts(record, outcome.case.first, end)


def _case(outcome: Outcome, bar: ErrorBar | None) -> CaseRow:
    from kvmhost.reclaim.record.reader import YoungRecord

    low, high = (None, None) if bar is None else bar.around(outcome.refaults_per_min)
    with YoungRecord.open(outcome.case.path) as record:
        covered, _ = _coverage(record, outcome)
    return CaseRow(
        file=str(outcome.case.path),
        policy=outcome.case.policy,
        options={name: str(value) for name, value in outcome.case.options},
        budget_pages=outcome.case.budget_pages,
        refaults=outcome.refaults,
        refaults_per_minute=round(outcome.refaults_per_min, 3),
        low_refaults_per_minute=low,
        high_refaults_per_minute=high,
        refault_share=round(outcome.refault_share, 6),
        saved_pages=round(outcome.saved_pages, 3),
        saved_share=round(outcome.saved_share, 6),
        wrong_share=round(outcome.wrong_share, 6),
        covered_share=covered["covered_share"],
    )


def _error_bar(policy: str, bar: ErrorBar) -> ErrorBarRow:
    return ErrorBarRow(
        policy=policy,
        engine=bar.engine,
        lowest_ratio=bar.lowest,
        highest_ratio=bar.highest,
        runs=[
            RealRunRow(
                budget_pages=run.budget_pages,
                predicted_refaults=run.predicted,
                real_refaults=run.real,
            )
            for run in bar.runs
        ],
    )


def _budget(given: Mark) -> Callable[[YoungRecord], int]:
    """Return a budget in pages as a function of a record; a share is of all pages touched."""
    if given.share is not None:
        share = given.share
        return lambda record: int(share * record.between(0, None, "or").count())
    n_bytes = int(given.size or 0)
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
    add_option(
        parser, "--policy", help="policies (default: lru_gen)", **listing(str, default=["lru_gen"])
    )
    parser.add_argument(
        "--budget",
        required=True,
        help="resident memory: 64M,96M, or a share of all that was touched: 25%%,1/2",
        **listing(mark, "SIZE|SHARE"),
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=V,V",
        help="values of an option of the policies; several: all combinations",
    )  # fmt: skip
    add_option(parser, "--windows")
    parser.add_argument(
        "--workers", type=number, metavar="N",
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
    add_option(parser, "--engine", help="what runs the vCPUs of the real runs")
    add_output_arguments(parser)
    return parser
