"""``kvmhost young``: look at young bitmaps of a running VM."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import YoungBitmap
from kvmhost.control.client import Client
from kvmhost.control.schema import HarvestCost, MemoryMap
from kvmhost.errors import LayoutError
from tools.args import count, seconds

__all__ = ["main"]

_SHOWN_RANGES = 10
_FIRST_WINDOW_S = 1.0
_BITMAP_KINDS = (".npy", ".bin")


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    return command(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvmhost young", description="Look at which pages of a running VM were touched."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    snapshot = commands.add_parser(
        "snapshot",
        help="one bitmap: counts, densities, ranges",
        description="Show which pages are young now. Without --clear nothing changes for "
        "anyone else who harvests the VM.",
    )
    _add_common(snapshot)
    snapshot.add_argument(
        "--window",
        type=seconds,
        metavar="SECONDS",
        help="clear first and look after this time (default: look at the window since the last "
        f"harvest of whomever; {_FIRST_WINDOW_S:g} if there was none)",
    )
    snapshot.add_argument(
        "--clear",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="begin a new window for the pages that are young",
    )
    snapshot.add_argument(
        "--rearm",
        choices=("none", "young", "all"),
        default="young",
        help="with --clear: what to arm again (default: young)",
    )
    snapshot.add_argument("--json", action="store_true", help="print JSON")
    snapshot.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="also write the bitmap: .npy for one boolean a page, .bin for 64-bit words",
    )
    snapshot.set_defaults(command=_snapshot)
    heatmap = commands.add_parser(
        "heatmap",
        help="a picture, gfn by time",
        description="Harvest a VM window by window and draw which pages were touched when. "
        "The harvests clear: a reclaim daemon on the same VM sees less meanwhile.",
    )
    _add_common(heatmap)
    heatmap.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FILE", help=".png, .svg, .pdf"
    )
    heatmap.add_argument(
        "--interval",
        type=seconds,
        default=0.1,
        metavar="SECONDS",
        help="length of a window (default: 0.1)",
    )
    heatmap.add_argument(
        "--count", type=count, default=120, metavar="N", help="windows (default: 120)"
    )
    heatmap.add_argument(
        "--bins", type=count, default=512, metavar="N", help="rows of the picture (default: 512)"
    )
    heatmap.set_defaults(command=_heatmap)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vm", metavar="VM", help="name of a VM, or path of its socket")
    parser.add_argument(
        "--tracker",
        default="auto",
        metavar="NAME",
        help="auto (the one in use, or the best), or one that doctor lists",
    )
    parser.add_argument(
        "--range",
        type=_gfn_range,
        metavar="GFN:GFN",
        help="from this gfn up to before that one; 0x for hex (default: all memory)",
    )


# -- snapshot -----------------------------------------------------------------


def _snapshot(args: argparse.Namespace) -> int:
    if args.out is not None:
        _check_out(args.out, _BITMAP_KINDS)
    with Client(args.vm) as vm:
        memory = vm.memory()
        gfn_start, n_pages = _range_of(args.range, memory)
        window_s = args.window
        tracker = vm.state().tracker
        if window_s is None and (tracker is None or args.tracker not in ("auto", tracker)):
            window_s = _FIRST_WINDOW_S
        if window_s is not None:
            vm.harvest(gfn_start, n_pages, tracker=args.tracker)
            time.sleep(window_s)
        bitmap, cost = vm.harvest_timed(
            gfn_start, n_pages, tracker=args.tracker, clear=args.clear, rearm=args.rearm
        )
    if args.out is not None:
        _write_bitmap(bitmap, args.out)
    if args.json:
        print(json.dumps(_summary(args.vm, bitmap, cost, memory)))
    else:
        _print_snapshot(args.vm, bitmap, cost, memory)
    return 0


def _summary(vm: str, bitmap: YoungBitmap, cost: HarvestCost, memory: MemoryMap) -> dict[str, Any]:
    starts, ends = _runs(bitmap)
    return {
        "vm": vm,
        "gfn_start": bitmap.gfn_start,
        "pages": bitmap.n_pages,
        "young": bitmap.count(),
        "coarse": bitmap.coarse is not None,
        **dataclasses.asdict(bitmap.provenance),
        "harvest_ns": cost.harvest_ns,
        "rearm_ns": cost.rearm_ns,
        "regions": _regions(bitmap, memory),
        "ranges": np.stack([starts, ends], axis=1).tolist(),
    }


def _regions(bitmap: YoungBitmap, memory: MemoryMap) -> list[dict[str, int]]:
    """Count young pages by memslot, inside the bitmap's range."""
    young, found = bitmap.as_bool(), []
    for region in memory.regions:
        first = max(region.gfn, bitmap.gfn_start)
        end = min(region.gfn + region.n_pages, bitmap.gfn_start + bitmap.n_pages)
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


def _print_snapshot(vm: str, bitmap: YoungBitmap, cost: HarvestCost, memory: MemoryMap) -> None:
    young, source = bitmap.count(), bitmap.provenance
    window = ""
    if source.window_start_ns:
        window = f", window {(source.window_end_ns - source.window_start_ns) / 1e9:.3f} s"
    print(
        f"{vm}: {young} of {bitmap.n_pages} pages young "
        f"({_percent(young, bitmap.n_pages)}), {young * memory.page_bytes / 2**20:.1f} MiB"
    )
    coarse = ", coarse: bits stand for more than one page" if bitmap.coarse is not None else ""
    print(f"tracker {source.tracker}, format {source.table_format}{window}{coarse}")
    print(f"harvest {cost.harvest_ns / 1e6:.2f} ms, re-arming {cost.rearm_ns / 1e6:.2f} ms")
    for region in _regions(bitmap, memory):
        pages = region["gfn_end"] - region["gfn_start"]
        print(
            f"slot {region['slot']} [{region['gfn_start']:#x}, {region['gfn_end']:#x}): "
            f"{region['young']} of {pages} young ({_percent(region['young'], pages)})"
        )
    starts, ends = _runs(bitmap)
    print(f"{starts.size} young ranges" + (", the first:" if starts.size else ""))
    for start, end in zip(starts[:_SHOWN_RANGES], ends[:_SHOWN_RANGES], strict=True):
        print(f"  [{start:#x}, {end:#x})  {end - start} pages")
    if starts.size > _SHOWN_RANGES:
        print(f"  and {starts.size - _SHOWN_RANGES} more")


def _runs(bitmap: YoungBitmap) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return starts and ends of the runs of young gfns, ends exclusive."""
    padded = np.concatenate([[False], bitmap.as_bool(), [False]])
    change = np.flatnonzero(padded[1:] != padded[:-1]) + bitmap.gfn_start
    return change[::2], change[1::2]


def _write_bitmap(bitmap: YoungBitmap, path: Path) -> None:
    """Write through a file beside it and a rename, so that nobody reads half of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as file:
        try:
            if path.suffix == ".npy":
                np.save(file, bitmap.as_bool())
            else:
                file.write(bitmap.words.astype("<u8").tobytes())
            file.flush()
            Path(file.name).chmod(0o666 & ~_umask())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _check_out(path: Path, kinds: Sequence[str]) -> None:
    """Refuse a file that cannot be written before any work is done for it.

    :raises LayoutError: if so
    """
    if path.suffix.lower() not in kinds:
        raise LayoutError(f"{path}: the name must end in {' or '.join(kinds)}")
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise LayoutError(f"{path}: no file can be written there")


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


# -- heatmap ------------------------------------------------------------------


def _heatmap(args: argparse.Namespace) -> int:
    from reclaim.young.render import PICTURE_KINDS, need_plotting, record_live, render_heatmap

    need_plotting()
    _check_out(args.out, PICTURE_KINDS)
    with Client(args.vm) as vm, _progress(args.count) as advance:
        gfn_start, n_pages = _range_of(args.range, vm.memory())
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
    print(f"{args.out}: {len(heatmap.columns)} windows of {args.vm}")
    return 0


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("harvesting", total=total)
        yield lambda: progress.advance(task)


# -- arguments ----------------------------------------------------------------


def _range_of(given: tuple[int, int] | None, memory: MemoryMap) -> tuple[int, int]:
    """Return (first gfn, pages).

    :raises LayoutError: for a range that is empty or ends above all memory
    """
    start, end = given or (0, memory.gfn_end)
    if not 0 <= start < end <= memory.gfn_end:
        raise LayoutError(f"--range {start:#x}:{end:#x}: memory has gfns [0, {memory.gfn_end:#x})")
    return start, end - start


def _gfn_range(text: str) -> tuple[int, int]:
    try:
        start, end = (int(part, 0) for part in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no range; write for example 0x400:0x1000"
        ) from None
    return start, end


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
