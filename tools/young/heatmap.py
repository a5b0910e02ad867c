"""``kvmhost young heatmap``: a picture of a running VM, gfn by time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tools.args import count, seconds
from tools.young.common import add_vm_arguments, check_out, open_source, progress_bar, range_of

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = _parser().parse_args(argv)
    from reclaim.young.render import PICTURE_KINDS, need_plotting, record_live, render_heatmap

    need_plotting()
    check_out(args.out, PICTURE_KINDS)
    with open_source(args) as vm, progress_bar(args.count) as advance:
        gfn_start, n_pages = range_of(args.range, vm.memory())
        heatmap = record_live(
            vm,
            interval_s=args.interval,
            count=args.count,
            tracker=args.tracker,
            gfn_start=gfn_start,
            n_pages=n_pages,
            n_bins=args.bins,
            on_window=advance,
        )
    render_heatmap(heatmap, args.out)
    print(f"{args.out}: {len(heatmap.columns)} windows of {vm.vm}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvmhost young heatmap",
        description="Harvest a VM window by window and draw which pages were touched when. "
        "The harvests clear: a reclaim daemon on the same VM sees less meanwhile.",
    )
    add_vm_arguments(parser, or_pid=True)
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FILE", help=".png, .svg, .pdf"
    )
    parser.add_argument(
        "--interval",
        type=seconds,
        default=0.1,
        metavar="SECONDS",
        help="length of a window (default: 0.1)",
    )
    parser.add_argument(
        "--count", type=count, default=120, metavar="N", help="windows (default: 120)"
    )
    parser.add_argument(
        "--bins", type=count, default=512, metavar="N", help="rows of the picture (default: 512)"
    )
    return parser
