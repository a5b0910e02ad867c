"""``kvmhost young heatmap``: a picture, gfn by time, of a record or a running VM."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvmhost.errors import LayoutError
from kvmhost.files import replacing
from kvmhost.printable import printable
from kvmhost.tools.args import count, seconds
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.young.common import (
    add_vm_arguments,
    check_out,
    open_source,
    progress_bar,
    range_of,
)
from kvmhost.tools.young.output import open_record, window_range, windows_of

if TYPE_CHECKING:
    from kvmhost.reclaim.draw.heatmapdata import RecordView

__all__ = ["main", "parser"]

_PAGE = ".html"


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from kvmhost.reclaim.draw.render import PICTURE_KINDS, need_plotting

    if args.out.suffix.lower() != _PAGE:
        need_plotting()
    check_out(args.out, (*PICTURE_KINDS, _PAGE))
    return _draw_record(args) if _is_file(args.vm) else _draw_live(args)


def _is_file(source: str | None) -> bool:
    """Tell a record from a VM: a VM's path is a socket, its name is no path."""
    path = Path(source or "")
    return source is not None and (path.is_dir() or ("/" in source and not path.is_socket()))


def _draw_record(args: argparse.Namespace) -> int:
    from kvmhost.reclaim.draw.heatmapdata import RecordView, heatmap_of
    from kvmhost.reclaim.draw.render import render_heatmap

    if args.pid is not None or args.interval is not None or args.count is not None:
        raise LayoutError("--pid, --interval and --count are for what runs; FILE has its windows")
    with open_record(Path(args.vm)) as record:
        view = RecordView(record, *windows_of(record, args.windows), args.range)
        if args.out.suffix.lower() == _PAGE:
            return _write_page(view, args)
        render_heatmap(heatmap_of(view, args.bins), args.out)
        print(printable(f"{args.out}: {view.n_windows} windows of {record.name or record.path}"))
    return 0


def _write_page(view: RecordView, args: argparse.Namespace) -> int:
    from kvmhost.reclaim.draw.heatmaphtml import write_html

    with replacing(args.out) as file:
        pyramid = write_html(view, file, args.max_mib << 20)
    finest = 1 << min(pyramid.levels)
    text = "down to single gfns"
    if finest > 1:
        text = (
            f"down to {finest} pages a cell: finer ones are above --max-mib {args.max_mib}; "
            "a part (--range, --windows) has them"
        )
    mib = args.out.stat().st_size / 2**20
    print(printable(f"{args.out}: {view.n_windows} windows, {text} ({mib:.1f} MiB)"))
    return 0


def _draw_live(args: argparse.Namespace) -> int:
    from kvmhost.reclaim.draw.heatmap import live_heatmap
    from kvmhost.reclaim.draw.render import render_heatmap

    if args.windows is not None or args.out.suffix.lower() == _PAGE:
        what = "--windows" if args.windows is not None else str(args.out)
        raise LayoutError(
            f"{what}: needs a record; make one with: kvmhost young record {args.vm or 'VM'} -o FILE"
        )
    windows, interval_s = args.count or 120, args.interval or 0.1
    with open_source(args) as vm, progress_bar(windows) as advance:
        gfn_start, n_pages = range_of(args.range, vm.memory())
        heatmap = live_heatmap(
            vm,
            interval_s=interval_s,
            count=windows,
            tracker=args.tracker,
            gfn_start=gfn_start,
            n_pages=n_pages,
            n_bins=args.bins,
            on_window=advance,
        )
    render_heatmap(heatmap, args.out)
    print(printable(f"{args.out}: {len(heatmap.columns)} windows of {vm.vm}"))
    return 0


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young heatmap",
        usage="%(prog)s (FILE | VM | --pid PID) -o OUT.png|svg|pdf|html [options]",
        description="Draw which pages were touched when: of a record (a FILE of young record), "
        "or of a running VM, which is then harvested window by window. "
        "Those harvests clear: a reclaim daemon on the same VM sees less meanwhile. "
        "OUT.html, of a record, zooms from all of memory down to single gfns, and needs "
        "no network.",
    )
    add_vm_arguments(parser, or_pid=True)
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="OUT", help=".png, .svg, .pdf, .html"
    )
    parser.add_argument(
        "--windows",
        type=window_range,
        metavar="A:B",
        help="of a record: from window A up to before B; --windows=-60: is the last 60",
    )
    parser.add_argument(
        "--interval",
        type=seconds,
        metavar="SECONDS",
        help="of a VM: length of a window (default: 0.1)",
    )
    parser.add_argument("--count", type=count, metavar="N", help="of a VM: windows (default: 120)")
    parser.add_argument(
        "--bins",
        type=count,
        default=512,
        metavar="N",
        help="rows of a .png, .svg, .pdf, at most (default: 512)",
    )
    parser.add_argument(
        "--max-mib",
        type=count,
        default=32,
        metavar="MIB",
        help="size of a .html; cells that do not fit are left out, finest first (default: 32)",
    )
    return parser
