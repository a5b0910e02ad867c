"""``kvmhost young heatmap``: plot a record or a running VM, gfn by time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kvmhost.errors import LayoutError
from kvmhost.printable import printable
from kvmhost.tools.args import count, size_bytes
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option
from kvmhost.tools.young.common import (
    add_vm_arguments,
    check_out,
    open_source,
    progress_bar,
    range_of,
)
from kvmhost.tools.young.output import open_record, windows_of
from kvmhost.tools.young.source import is_record

__all__ = ["main", "parser"]

_INTERVAL_S, _COUNT = 0.1, 120


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from kvmhost.reclaim.draw.registry import PICTURES, kind_of

    check_out(args.out, tuple(PICTURES))
    kind_of(args.out).check_available()
    return _draw_record(args) if args.pid is None and is_record(args.vm) else _draw_live(args)


def _draw_record(args: argparse.Namespace) -> int:
    from kvmhost.reclaim.draw.heatmapdata import RecordView, used_view
    from kvmhost.reclaim.draw.registry import draw_record

    if args.pid is not None or args.interval is not None or args.count is not None:
        raise LayoutError("--pid, --interval and --count apply to running VMs, not to a FILE")
    with open_record(Path(args.vm)) as record:
        windows = windows_of(record, args.windows)
        if args.all or args.range is not None:
            view = RecordView(record, *windows, args.range)
        else:
            view = used_view(record, *windows)
        drawn = draw_record(view, args.out, n_bins=args.bins, max_bytes=args.max_size)
    print(printable(f"{args.out}: {drawn}"))
    return 0


def _draw_live(args: argparse.Namespace) -> int:
    from kvmhost.reclaim.draw.live import draw_vm
    from kvmhost.reclaim.record.recorder import RecordingPlan

    if args.windows is not None:
        raise LayoutError(
            "--windows: needs a record; create one with: "
            f"kvmhost young record {args.vm or 'VM'} -o FILE"
        )
    n_windows = args.count or _COUNT
    with open_source(args.vm, args.pid, args.mapping) as vm, progress_bar(n_windows) as advance:
        given = args.range and (args.range[0], sum(range_of(args.range, vm.memory_map())))
        plan = RecordingPlan(
            args.interval or _INTERVAL_S,
            n_windows,
            args.tracker,
            given,
            view=args.view,
            force=args.force,
        )
        drawn = draw_vm(
            vm,
            args.out,
            plan,
            show_all=args.all,
            on_window=advance,
            n_bins=args.bins,
            max_bytes=args.max_size,
        )
    print(printable(f"{args.out}: {drawn}"))
    return 0


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    from kvmhost.reclaim.draw.registry import PICTURES

    parser = CommandParser(
        prog="kvmhost young heatmap",
        usage=f"%(prog)s (FILE | VM | --pid PID) -o OUT{'|'.join(PICTURES)} [options]",
        description="Draw which pages were touched over time, from a record (a FILE of young "
        "record) or from a running VM, which is then recorded first, in a view of its own "
        "beside all other readers. OUT.html zooms from all of memory down to single gfns, and "
        "needs no network. Of a mostly idle memory the parts that are used are shown.",
    )
    add_vm_arguments(parser, or_pid=True)
    add_option(parser, "--out", required=True, metavar="OUT", help=", ".join(PICTURES))
    add_option(
        parser, "--windows", help="of a record: windows [A, B); --windows=-60: selects the last 60"
    )
    add_option(
        parser,
        "--interval",
        default=None,
        help="of a VM: length of a window (default: 100ms)",
    )
    add_option(parser, "--count", help="of a VM: number of windows (default: 120)")
    add_option(parser, "--view", default="heatmap")
    add_option(parser, "--force")
    parser.add_argument(
        "--all",
        action="store_true",
        help="show all of memory, also where no page was young (default: only the used parts, "
        "if they are at most half of it; --range selects others)",
    )
    parser.add_argument(
        "--bins",
        type=count,
        default=512,
        metavar="N",
        help="maximum number of rows of a .png, .svg or .pdf (default: 512)",
    )
    parser.add_argument(
        "--max-size",
        type=size_bytes,
        default="32M",
        metavar="SIZE",
        help="size limit of a .html; the finest cells are omitted if necessary (default: 32M)",
    )
    return parser
