"""``kvmhost young snapshot``: one bitmap of a running VM: counts, densities, ranges."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import YoungBitmap, unpack
from kvmhost.control.client import Client
from kvmhost.control.schema import CLIENT_TIMEOUT_S, MemoryMap
from kvmhost.errors import LayoutError
from kvmhost.files import replacing
from kvmhost.printable import printable
from kvmhost.process.attach import Attached
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.young import YoungSlot, YoungSnapshotOutput
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
from kvmhost.vm.names import DEFAULT_VIEW, NOT_SEEN, REARM, TABLE_FORMATS

__all__ = ["main", "parser"]

Pages = npt.NDArray[np.bool_]

_SHOWN_RANGES = 10
_FIRST_WINDOW_S = 1.0
_OWN_VIEW = "snapshot"
_BITMAP_KINDS = (".npy", ".npz", ".bin")
#: A number that no event has: a request for residency alone.
_NO_EVENTS = 1 << 51


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
                table_format=args.format,
            )
        states = _states(vm, found.young)
    if args.out is not None:
        _write_bitmap(found.young, states, args.out)
    output = _output(vm.vm, found, memory, states)
    if args.json:
        emit(output)
    else:
        _print_snapshot(output, memory.page_bytes)
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
    if args.interval is not None or args.tracker == "present":
        window_s: float | None = args.interval
        return window_s
    is_new = tracker is None or args.tracker not in ("auto", tracker)
    return _FIRST_WINDOW_S if is_new or view != DEFAULT_VIEW else None


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young snapshot",
        description="Show which pages a VM touches, in a window of the command's own. A daemon "
        "and other readers find what they would find without it: unlike a harvest in Python or "
        "over HTTP, it clears nothing in the view default unless --clear is given.",
    )
    add_vm_arguments(parser, or_pid=True)
    add_option(
        parser,
        "--format",
        choices=TABLE_FORMATS,
        metavar=None,
        help="feed the harvest into a model table of this format and show what its walker finds "
        "(default: what the tracker finds)",
    )
    add_option(
        parser,
        "--interval",
        default=None,
        help="begin a window and look after this time (default: 1s; with --view default, the "
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
    add_option(
        parser,
        "--fraction",
        default=None,
        help=f"with --rearm sample, for example 1/4 (default: 1/{1 / DEFAULT_FRACTION:.0f})",
    )
    add_option(
        parser,
        "--view",
        help="the window to look at (default: one of its own; default is the one of all readers "
        "that name none, which stays between commands)",
    )
    add_option(parser, "--force")
    add_option(parser, "--json")
    add_option(
        parser,
        "--out",
        metavar="FILE",
        help="also write the bitmap: .npy for one boolean per page, .bin for 64-bit words, .npz "
        "for booleans named young, coarse, and, of a VM, resident and evicted",
    )
    return parser


def _states(vm: Client | Attached, young: YoungBitmap) -> dict[str, Pages]:
    """Return which pages of a range are resident and evicted; empty: unknown."""
    if isinstance(vm, Attached):  # Another process's pager cannot be asked.
        return {}
    found = vm.residency(_NO_EVENTS)
    end = young.gfn_start + young.n_pages
    bits = {"resident": found.resident, "evicted": found.evicted}
    return {
        name: unpack(np.frombuffer(raw, dtype="<u8"), end)[young.gfn_start :]
        for name, raw in bits.items()
    }


def _output(
    vm: str, found: Harvest, memory: MemoryMap, states: dict[str, Pages]
) -> YoungSnapshotOutput:
    bitmap = found.young
    counts = {name: int(mask.sum()) for name, mask in states.items()}
    return YoungSnapshotOutput(
        vm=vm,
        gfn_start=bitmap.gfn_start,
        n_pages=bitmap.n_pages,
        n_young=bitmap.count(),
        n_resident=counts.get("resident"),
        n_evicted=counts.get("evicted"),
        not_seen=NOT_SEEN.get(bitmap.provenance.tracker, ""),
        coarse=bitmap.coarse is not None,
        **dataclasses.asdict(bitmap.provenance),
        harvest_ns=found.harvest_ns,
        rearm_ns=found.rearm_ns,
        memslots=list(_slots(bitmap, memory)),
        ranges=_ranges(bitmap),
    )


def _slots(bitmap: YoungBitmap, memory: MemoryMap) -> Iterator[YoungSlot]:
    """Count young pages by memslot, inside the bitmap's range."""
    young = bitmap.as_bool()
    for memslot in memory.memslots:
        first = max(memslot.gfn_start, bitmap.gfn_start)
        end = min(memslot.gfn_start + memslot.n_pages, bitmap.gfn_start + bitmap.n_pages)
        if first < end:
            inside = young[first - bitmap.gfn_start : end - bitmap.gfn_start]
            yield YoungSlot(
                slot=memslot.slot,
                gfn_start=first,
                n_pages=end - first,
                n_young=int(inside.sum()),
            )


def _print_snapshot(found: YoungSnapshotOutput, page_bytes: int) -> None:
    window = ""
    if found.window_start_ns:
        window = f", window {(found.window_end_ns - found.window_start_ns) / 1e9:.3f} s"
    print(
        f"{printable(found.vm)}: {found.n_young} of {found.n_pages} pages young "
        f"({percent(found.n_young, found.n_pages)}), {found.n_young * page_bytes / 2**20:.1f} MiB"
    )
    coarse = ", coarse: bits stand for more than one page" if found.coarse else ""
    where = f"tracker {found.tracker}, format {found.table_format}"
    print(f"{printable(where)}{window}{coarse}")
    if found.not_seen:
        print(f"{found.not_seen} are not seen")
    if found.n_resident is not None and found.n_evicted is not None:
        print(f"{found.n_resident} pages resident, {found.n_evicted} evicted")
    else:
        print("residency unknown")
    print(f"harvest {found.harvest_ns / 1e6:.2f} ms, re-arming {found.rearm_ns / 1e6:.2f} ms")
    for one in found.memslots:
        print(
            f"slot {one.slot} [{one.gfn_start:#x}, {one.gfn_start + one.n_pages:#x}): "
            f"{one.n_young} of {one.n_pages} young ({percent(one.n_young, one.n_pages)})"
        )
    print(f"{len(found.ranges)} young ranges" + (", the first:" if found.ranges else ""))
    for start, n_pages in found.ranges[:_SHOWN_RANGES]:
        print(f"  [{start:#x}, {start + n_pages:#x})  {n_pages} pages")
    if len(found.ranges) > _SHOWN_RANGES:
        print(f"  and {len(found.ranges) - _SHOWN_RANGES} more")


def _ranges(bitmap: YoungBitmap) -> list[tuple[int, int]]:
    """Return the runs of young gfns as pairs of start and length."""
    padded = np.concatenate([[False], bitmap.as_bool(), [False]])
    change = np.flatnonzero(padded[1:] != padded[:-1]) + bitmap.gfn_start
    starts, lengths = change[::2], change[1::2] - change[::2]
    return list(zip(starts.tolist(), lengths.tolist(), strict=True))


def _write_bitmap(bitmap: YoungBitmap, states: dict[str, Any], path: Path) -> None:
    with replacing(path) as file:
        if path.suffix == ".npy":
            np.save(file, bitmap.as_bool())
        elif path.suffix == ".npz":
            masks: dict[str, Any] = {"young": bitmap.as_bool(), "coarse": bitmap.coarse_as_bool()}
            np.savez_compressed(file, **masks, **states)
        else:
            file.write(bitmap.words.astype("<u8").tobytes())
