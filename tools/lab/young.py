"""``kvmhost lab young HOST``: harvest the tables that a host's own KVM built, from outside."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmhost._ffi import ffi, lib
from kvmhost.bitmap import YoungBitmap
from kvmhost.errors import LayoutError
from kvmhost.guests import image_path
from kvmhost.lab.epochs import MOST_PAGES
from kvmhost.lab.hosts import find_host
from kvmhost.lab.running import JobOutput
from kvmhost.lab.tables import GuestTables, open_tables
from kvmhost.mmu.kvmtable import KvmTable
from kvmhost.tools.lab.run import add_host_arguments, split_command
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option
from kvmhost.units import PAGE_BYTES

if TYPE_CHECKING:
    from kvmhost.reclaim.record.writer import RecordWriter

__all__ = ["main", "parser"]

_ROUNDS = 101


def main(argv: Sequence[str]) -> int:
    """Run the command; return 1 if a window of the built-in guest is not exact."""
    own, command = split_command(list(argv))
    args = parser().parse_args(own)
    host = find_host(args.host)
    if command and args.range is None:
        raise LayoutError("a command's guest has its memory where it likes: give --range GFN:GFN")
    if args.out is not None:
        from kvmhost.reclaim.record.chunks import need_zstd

        need_zstd()
    options: dict[str, Any] = {
        "n_pages": args.guest_pages,
        "stride": args.stride,
        "huge": args.huge,
    }
    options |= {"command": command} if command else {"image": str(image_path("touch"))}
    with open_tables(
        host, options, mem_bytes=args.mem, timeout_s=args.timeout, on_output=_pass_on
    ) as tables:
        return _run(tables, args, with_epochs=not command)


def _run(tables: GuestTables, args: argparse.Namespace, with_epochs: bool) -> int:
    exact = True
    touched = tables.run_epoch() if with_epochs else []
    _wait_for_root(tables)
    table = tables.table()
    unit = table.page_bytes // PAGE_BYTES
    gfn_start, gfn_end = args.range or (touched[0] // unit, touched[-1] // unit + 1)
    print(f"{table.root}; gfns [{gfn_start:#x}, {gfn_end:#x}) of {table.page_bytes >> 10} KiB")
    tables.harvest(gfn_start, gfn_end - gfn_start)  # the start of the first window
    with _record(args.out, gfn_start, gfn_end, table.page_bytes) as record:
        for window in range(args.count):
            if with_epochs:
                touched = tables.run_epoch()
            else:
                time.sleep(args.interval)
            young = tables.harvest(gfn_start, gfn_end - gfn_start)
            if record is not None:
                record.append(young, wall_ns=time.time_ns())
            coarse = int(young.coarse_as_bool().sum())
            line = f"window {window}: {young.count()} young, {coarse} of them coarse"
            if with_epochs:
                wanted = {gfn // unit for gfn in touched}
                wrong = _compare(young, wanted)
                exact = exact and wrong == (0, 0)
                line += f"; of {len(wanted)} touched {wrong[0]} missed, {wrong[1]} others"
            print(line, flush=True)
    if args.cost:
        _print_cost(table, gfn_start, gfn_end - gfn_start)
    return 0 if exact else 1


def _print_cost(table: KvmTable, gfn_start: int, n_pages: int) -> None:
    """Print what a test of the range costs, relative to a plain sum over the same entries."""
    spans = [
        # SAFETY: the addresses lie in the host's memory, which is mapped while the table is open.
        (ffi.cast("uint64_t *", address), n)
        for address, n in table.last_level(gfn_start, n_pages)
    ]
    times: dict[str, list[int]] = {"harvest": [], "sum": []}
    for _ in range(_ROUNDS):
        start = time.perf_counter_ns()
        table.harvest(gfn_start, n_pages, clear=False)
        middle = time.perf_counter_ns()
        for entries, n in spans:
            lib.kh_bench_sum(entries, n)
        times["harvest"].append(middle - start)
        times["sum"].append(time.perf_counter_ns() - middle)
    harvest, plain = (statistics.median(times[name]) for name in ("harvest", "sum"))
    print(
        f"test of {n_pages} pages: {harvest / n_pages:.2f} ns a page, {harvest / plain:.2f} times "
        f"a plain sum over the same {len(spans)} tables (medians of {_ROUNDS} rounds)"
    )


def _compare(young: YoungBitmap, wanted: set[int]) -> tuple[int, int]:
    """Return how many touched pages were missed, and how many others were exactly young."""
    found = set(young)
    coarse = young.coarse_as_bool()
    exact = {gfn for gfn in found if not coarse[gfn - young.gfn_start]}
    return len(wanted - found), len(exact - wanted)


def _wait_for_root(tables: GuestTables) -> None:
    """Wait until the guest of a command has a root, for as long as the command runs."""
    while not (answer := tables.ask("roots"))["roots"] and answer["running"]:
        time.sleep(0.5)


@contextlib.contextmanager
def _record(
    out: Path | None, gfn_start: int, gfn_end: int, page_bytes: int
) -> Iterator[RecordWriter | None]:
    if out is None:
        yield None
        return
    from kvmhost.reclaim.record.writer import RecordWriter

    n_pages = gfn_end - gfn_start
    writer = RecordWriter.create(out, n_pages, gfn_start=gfn_start, page_bytes=page_bytes)
    with contextlib.closing(writer):
        yield writer


def _pass_on(event: JobOutput) -> None:
    sys.stderr.buffer.write(event.data)
    sys.stderr.buffer.flush()


def _range_pages(text: str) -> int:
    """Parse a number of pages that the built-in guests have room for."""
    if not text.isdecimal() or not 1 <= int(text[:6]) <= MOST_PAGES:
        raise argparse.ArgumentTypeError(f"invalid number {text!r}: from 1 to {MOST_PAGES}")
    return int(text)


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost lab young",
        usage="kvmhost lab young [options] HOST [-- COMMAND...]",
        description="Boot an emulated host, run a guest in it, and test and clear the accessed "
        "bits of the second-stage tables that the host's own KVM built for it, from outside, "
        "without a lock. The built-in guest touches the same pages in each epoch, and each window "
        "is compared with them. Another guest is given by its COMMAND, which runs inside.",
        epilog="Exit codes: 0 every window exact, 1 one is not, or an entry of the tables makes "
        "no sense; 124 timed out, 125 the host failed, 126 QEMU, kernel or root is missing.",
    )
    add_host_arguments(parser)
    add_option(parser, "--count", default=5, help="number of windows")
    add_option(parser, "--interval", help="of a COMMAND: time between two harvests", default="1s")
    add_option(parser, "--range", help="gfns, in pages of the table; of a COMMAND: needed")
    parser.add_argument(
        "--guest-pages",
        type=_range_pages,
        default=1024,
        metavar="N",
        help=f"pages of the built-in guest's range, at most {MOST_PAGES} (default: 1024)",
    )
    parser.add_argument(
        "--stride",
        type=_range_pages,
        default=3,
        metavar="N",
        help="it touches every Nth page (default: 3)",
    )
    parser.add_argument(
        "--huge", action="store_true", help="its memory is in huge pages (arm64, ppc64el)"
    )
    parser.add_argument(
        "--cost",
        action="store_true",
        help="at the end, time a test of the range and a plain sum over the same entries",
    )
    add_option(parser, "--out", metavar="FILE", help="write a record of the windows")
    add_option(parser, "--timeout", default="3600s", help="end the host after this time")
    return parser
