"""``kvmhost young snapshot``: one bitmap of a running VM: counts, densities, ranges."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import YoungBitmap
from kvmhost.control.schema import CLIENT_TIMEOUT_S, MemoryMap
from kvmhost.errors import LayoutError
from kvmhost.files import replacing
from kvmhost.printable import printable
from kvmhost.tools.args import seconds, share
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import working
from kvmhost.tools.vocabulary import add_option
from kvmhost.tools.young.common import (
    add_vm_arguments,
    check_out,
    open_source,
    percent,
    range_of,
)
from kvmhost.trackers.sampling import DEFAULT_FRACTION
from kvmhost.vm import Harvest
from kvmhost.vm.names import DEFAULT_VIEW, REARM, TABLE_FORMATS

__all__ = ["main", "parser"]

_SHOWN_RANGES = 10
_FIRST_WINDOW_S = 1.0
_OWN_VIEW = "snapshot"
_BITMAP_KINDS = (".npy", ".bin")


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.out is not None:
        check_out(args.out, _BITMAP_KINDS)
    with open_source(args.vm, args.pid, args.mapping) as vm:
        waiting = f"waiting for {vm.vm} to answer, at most {CLIENT_TIMEOUT_S:g} s per request"
        with working(waiting):
            memory, tracker = vm.memory_map(), vm.state().tracker
        gfn_start, n_pages = range_of(args.range, memory)
        view = _view(args)
        window_s = _window_s(args, view, tracker)
        ask = functools.partial(
            vm.harvest, gfn_start, n_pages, tracker=args.tracker, view=view, force=args.force
        )
        if window_s is not None:
            with working(waiting):
                ask()
            with working(f"waiting for the end of a window of {window_s:g} s"):
                time.sleep(window_s)
        with working(waiting):
            found = ask(
                clear=args.clear,
                rearm=args.rearm,
                fraction=args.fraction,
                table_format=args.format or None,
            )
    if args.out is not None:
        _write_bitmap(found.young, args.out)
    if args.json:
        print(json.dumps(_summary(vm.vm, found, memory)))
    else:
        _print_snapshot(vm.vm, found, memory)
    return 0


def _view(args: argparse.Namespace) -> str:
    """Return the view to look at.

    :raises LayoutError: if a window would begin in a view that ends with the command
    """
    shared = args.pid is not None or args.clear
    view: str = args.view or (DEFAULT_VIEW if shared else _OWN_VIEW)
    if args.clear and view != DEFAULT_VIEW:
        raise LayoutError(
            f"--clear begins a window, and the view {view!r} ends with this command; "
            f"clear with --view {DEFAULT_VIEW}"
        )
    return view


def _window_s(args: argparse.Namespace, view: str, tracker: str | None) -> float | None:
    """Return how long to wait for a window; None: look at the one that is open."""
    # The set of pages that were ever touched has no window.
    if args.window is not None or args.tracker == "present":
        window_s: float | None = args.window
        return window_s
    is_new = tracker is None or args.tracker not in ("auto", tracker)
    return _FIRST_WINDOW_S if is_new or view != DEFAULT_VIEW else None


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young snapshot",
        description="Show which pages a VM touches, in a window of the command's own. A daemon "
        "and other readers find what they would find without it.",
    )
    add_vm_arguments(parser, or_pid=True)
    parser.add_argument(
        "--format",
        choices=("", *TABLE_FORMATS),
        default="",
        help="feed the harvest into a model table of this format and show what its walker finds "
        "(default: what the tracker finds)",
    )
    parser.add_argument(
        "--window",
        type=seconds,
        metavar="SECONDS",
        help="begin a window and look after this time (default: 1 s; with --view default, the "
        "window since it was last cleared)",
    )
    parser.add_argument(
        "--clear",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="look at the view default, and begin a new window in it for the young pages",
    )
    parser.add_argument(
        "--rearm",
        choices=REARM,
        default="young",
        help="with --clear: what to arm again (default: young); sample clears and re-arms "
        "only a fraction of the pages, other ones each time",
    )
    parser.add_argument(
        "--fraction",
        type=share,
        metavar="SHARE",
        help=f"with --rearm sample, for example 1/4 (default: 1/{1 / DEFAULT_FRACTION:.0f})",
    )
    add_option(
        parser,
        "--view",
        help="the window to look at (default: one of its own; default is the one of all readers "
        "that name none, which stays between commands)",
    )
    add_option(parser, "--force")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="also write the bitmap: .npy for one boolean a page, .bin for 64-bit words",
    )
    return parser


def _summary(vm: str, found: Harvest, memory: MemoryMap) -> dict[str, Any]:
    bitmap = found.young
    starts, ends = _runs(bitmap)
    return {
        "vm": vm,
        "gfn_start": bitmap.gfn_start,
        "pages": bitmap.n_pages,
        "young": bitmap.count(),
        "coarse": bitmap.coarse is not None,
        **dataclasses.asdict(bitmap.provenance),
        "harvest_ns": found.harvest_ns,
        "rearm_ns": found.rearm_ns,
        "regions": _regions(bitmap, memory),
        "ranges": np.stack([starts, ends], axis=1).tolist(),
    }


def _regions(bitmap: YoungBitmap, memory: MemoryMap) -> list[dict[str, int]]:
    """Count young pages by memslot, inside the bitmap's range."""
    young, found = bitmap.as_bool(), []
    for region in memory.memslots:
        first = max(region.gfn_start, bitmap.gfn_start)
        end = min(region.gfn_start + region.n_pages, bitmap.gfn_start + bitmap.n_pages)
        if first < end:
            inside = young[first - bitmap.gfn_start : end - bitmap.gfn_start]
            found.append(
                {
                    "slot": region.slot,
                    "gfn_start": first,
                    "gfn_end": end,
                    "young": int(inside.sum()),
                }
            )
    return found


def _print_snapshot(vm: str, found: Harvest, memory: MemoryMap) -> None:
    bitmap = found.young
    young, source = bitmap.count(), bitmap.provenance
    window = ""
    if source.window_start_ns:
        window = f", window {(source.window_end_ns - source.window_start_ns) / 1e9:.3f} s"
    print(
        f"{printable(vm)}: {young} of {bitmap.n_pages} pages young "
        f"({percent(young, bitmap.n_pages)}), {young * memory.page_bytes / 2**20:.1f} MiB"
    )
    coarse = ", coarse: bits stand for more than one page" if bitmap.coarse is not None else ""
    where = f"tracker {source.tracker}, format {source.table_format}"
    print(f"{printable(where)}{window}{coarse}")
    print(f"harvest {found.harvest_ns / 1e6:.2f} ms, re-arming {found.rearm_ns / 1e6:.2f} ms")
    for region in _regions(bitmap, memory):
        pages = region["gfn_end"] - region["gfn_start"]
        print(
            f"slot {region['slot']} [{region['gfn_start']:#x}, {region['gfn_end']:#x}): "
            f"{region['young']} of {pages} young ({percent(region['young'], pages)})"
        )
    starts, ends = _runs(bitmap)
    print(f"{starts.size} young ranges" + (", the first:" if starts.size else ""))
    for start, end in zip(starts[:_SHOWN_RANGES], ends[:_SHOWN_RANGES], strict=True):
        print(f"  [{start:#x}, {end:#x})  {end - start} pages")
    if starts.size > _SHOWN_RANGES:
        print(f"  and {starts.size - _SHOWN_RANGES} more")


def _runs(bitmap: YoungBitmap) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return starts and exclusive ends of the runs of young gfns."""
    padded = np.concatenate([[False], bitmap.as_bool(), [False]])
    change = np.flatnonzero(padded[1:] != padded[:-1]) + bitmap.gfn_start
    return change[::2], change[1::2]


def _write_bitmap(bitmap: YoungBitmap, path: Path) -> None:
    with replacing(path) as file:
        if path.suffix == ".npy":
            np.save(file, bitmap.as_bool())
        else:
            file.write(bitmap.words.astype("<u8").tobytes())
