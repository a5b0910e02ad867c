"""``kvmhost reclaimd``: keep VMs under a memory budget by evicting cold pages."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from reclaim.daemon import Daemon, Dropped, PassReport, Settings
from reclaim.pressure.budget import DEFAULT_HIGH, DEFAULT_LOW, Budget
from tools.args import count, seconds, share, size_bytes

__all__ = ["main"]

_EXIT_FAILED, _EXIT_INTERRUPTED = 1, 130


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = _parser().parse_args(argv)
    settings = Settings(
        budget=Budget.of(args.budget, _mark(args.high, args.budget), _mark(args.low, args.budget)),
        interval_s=args.interval,
        tracker=args.tracker,
        sample=args.sample,
        n_generations=args.generations,
        seed=args.seed,
    )
    report = _print_json if args.json else _print_line
    daemon = Daemon(args.vm, settings, report, passes=args.passes, wait=args.wait)
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        daemon.stop()

    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        good = daemon.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in received:
        return _EXIT_INTERRUPTED
    return 0 if good or received else _EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvmhost reclaimd",
        description="Harvest accessed bits of running VMs, age their pages in generations, and "
        "evict the oldest while a VM is above its budget. Guest data stays in the VMs: the "
        "daemon may be killed and started again at any time, and a VM keeps the limit that "
        "it was given.",
        epilog="Ends by SIGTERM (exit code 0), SIGINT (130), after --passes, or when all VMs "
        "are gone (0; 1 if one could not be looked after).",
    )
    parser.add_argument("vm", nargs="+", metavar="VM", help="name of a VM, or path of its socket")
    parser.add_argument(
        "--budget",
        type=size_bytes,
        required=True,
        metavar="SIZE",
        help="resident memory of each VM, which its fault handler never lets it exceed",
    )
    parser.add_argument(
        "--high",
        type=_size_or_share,
        metavar="SIZE|N%",
        help=f"evict in the background above this (default: {DEFAULT_HIGH:.0%}% of the budget)",
    )
    parser.add_argument(
        "--low",
        type=_size_or_share,
        metavar="SIZE|N%",
        help=f"and down to this (default: {DEFAULT_LOW:.0%}% of the budget)",
    )
    parser.add_argument(
        "--interval",
        type=seconds,
        default=1.0,
        metavar="SECONDS",
        help="time from one pass to the next (default: 1)",
    )
    parser.add_argument(
        "--tracker",
        default="auto",
        metavar="NAME",
        help="where young bits come from: auto (the VM's choice), or one that doctor lists",
    )
    parser.add_argument(
        "--sample",
        type=share,
        metavar="SHARE",
        help="clear and re-arm only this share of the pages at each harvest, for example 1/8: "
        "the guest loses that much less, and a page takes 8 passes to look old (default: all)",
    )
    parser.add_argument(
        "--generations",
        type=int,
        default=4,
        metavar="N",
        help="generations to keep apart; the two youngest are never evicted (default: 4)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="shuffle pages of one generation, by this seed (default: in order of gfn)",
    )
    parser.add_argument(
        "--passes", type=count, metavar="N", help="end after so many passes over each VM"
    )
    parser.add_argument("--wait", action="store_true", help="wait for VMs that are not running yet")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def _size_or_share(text: str) -> int | float:
    """Parse a size, or ``90%`` as 0.9."""
    if text.endswith("%"):
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no share; write for example 90%")
        return share
    return size_bytes(text)


def _mark(given: int | float | None, budget_bytes: int) -> int | None:
    return int(given * budget_bytes) if isinstance(given, float) else given


def _print_line(event: PassReport | Dropped) -> None:
    stream = sys.stderr if isinstance(event, Dropped) and event.failed else sys.stdout
    print(event.line(), file=stream, flush=True)


def _print_json(event: PassReport | Dropped) -> None:
    kind = "dropped" if isinstance(event, Dropped) else "pass"
    print(json.dumps({"event": kind} | dataclasses.asdict(event)), flush=True)
