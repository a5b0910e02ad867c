"""``kvmhost young record``: record young bitmaps of running VMs into files."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvmhost.errors import CapabilityError, ControlError, LayoutError, VmGoneError
from kvmhost.files import own_directory
from kvmhost.printable import printable
from kvmhost.tools.ending import EXIT_FAILED, exit_code
from kvmhost.tools.outputs.base import emit, emit_error
from kvmhost.tools.outputs.young import RecordOutput
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option
from kvmhost.tools.young.common import add_process_arguments, open_source

if typing.TYPE_CHECKING:
    from kvmhost.control.client import Client
    from kvmhost.process.attach import Attached

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command; return 1 if the recording of a VM ended early."""
    args = parser().parse_args(argv)
    from kvmhost.reclaim.record.chunks import need_zstd
    from kvmhost.reclaim.record.recorder import RecordingPlan

    need_zstd()
    places = _places(args)
    plan = RecordingPlan(
        args.interval, args.count, args.tracker, args.range, args.append, args.view, args.force
    )
    stop = threading.Event()
    with (
        _stopping(stop),
        _counter(args.count, len(places)) as advance,
        concurrent.futures.ThreadPoolExecutor(len(places)) as pool,
    ):
        jobs = [
            pool.submit(_record, _opener(args, vm), vm, path, plan, stop, advance, args.json)
            for vm, path in places.items()
        ]
    return max(job.result() for job in jobs)


def _opener(args: argparse.Namespace, vm: str) -> Callable[[], Client | Attached]:
    given = None if args.pid is not None else vm
    return lambda: open_source(given, args.pid, args.mapping)


def _record(
    opened: Callable[[], Client | Attached],
    vm: str,
    path: Path,
    plan: object,
    stop: threading.Event,
    advance: Callable[[], None],
    as_json: bool,
) -> int:
    from kvmhost.reclaim.record.recorder import RecordingPlan, record_vm

    assert isinstance(plan, RecordingPlan)
    try:
        with opened() as client:
            ended = record_vm(client, path, plan, stop, advance)
    except (VmGoneError, ControlError, CapabilityError, LayoutError) as error:
        message = f"{path}: {error}"
        print(printable(message), file=sys.stderr)
        if as_json:
            emit_error(error, message, exit_code(error))
        return exit_code(error)
    except OSError as error:
        message = (
            f"{path}: {error.strerror or error}; what was whole is kept, and --append goes on "
            "with it"
        )
        print(printable(message), file=sys.stderr)
        if as_json:
            emit_error(error, message, EXIT_FAILED)
        return EXIT_FAILED
    if as_json:
        emit(
            RecordOutput(
                vm=vm,
                file=str(path),
                n_windows=ended.windows,
                total_windows=ended.total_windows,
                late_windows=ended.late,
                reason=ended.reason,
            )
        )
        return 0
    late = f", {ended.late} of them late" if ended.late else ""
    total = f" ({ended.total_windows} in all)" if ended.total_windows != ended.windows else ""
    ended_as = f"{ended.windows} windows of {vm}{total}{late}; {ended.reason}"
    print(printable(f"{path}: {ended_as}"))
    return 0


def _places(args: argparse.Namespace) -> dict[str, Path]:
    """Return a path per VM: the given file for one VM, files in a directory for several."""
    vms: list[str] = args.vms or ([] if args.pid is None else [f"pid {args.pid}"])
    if not vms or (args.vms and args.pid is not None):
        raise LayoutError("give names of VMs, or --pid PID; one of both")
    if not args.out.parent.is_dir():
        raise LayoutError(f"{args.out}: there is no directory {args.out.parent}")
    if len(vms) == 1:
        places = {vms[0]: args.out}
    else:
        places = {vm: args.out / Path(vm).stem for vm in vms}
        if len(set(places.values())) < len(set(vms)) or len(set(vms)) < len(vms):
            raise LayoutError(f"two of {', '.join(vms)} have the same name")
    there = [str(path) for path in places.values() if path.exists()]
    if there and not args.append:
        raise LayoutError(f"{', '.join(there)}: there already; take another, or --append to it")
    if len(vms) > 1:
        own_directory(args.out)
    return places


@contextlib.contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the recording after all data has been written."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _counter(total: int | None, n_vms: int) -> Iterator[Callable[[], None]]:
    """Count windows on a terminal; nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("recording, Ctrl-C ends"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("windows", total=None if total is None else total * n_vms)
        yield lambda: progress.advance(task)


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young record",
        description="Harvest VMs window by window and write which pages were young. Ctrl-C, "
        "SIGTERM or the VM's end ends the recording; --append goes on with it. The record "
        "can be read meanwhile: by young wss, hot, ..., and by anything that reads Zarr. "
        "A daemon or a live view of the same VM finds what it would find without the recording.",
    )
    parser.add_argument("vms", metavar="VM", nargs="*", help="name of a VM, or path of its socket")
    add_process_arguments(parser)
    add_option(
        parser,
        "--out",
        required=True,
        metavar="FILE",
        help="the record (a directory of chunk files); of several VMs one each in it",
    )
    add_option(parser, "--interval", help="length of a window")
    add_option(parser, "--count", help="number of windows (default: until Ctrl-C)")
    add_option(
        parser, "--tracker", help="auto (the one in use, or the best), or one that doctor lists"
    )
    add_option(parser, "--view", default="record")
    add_option(parser, "--force")
    add_option(parser, "--range")
    parser.add_argument("--append", action="store_true", help="go on with a record that is there")
    add_option(parser, "--json", help="print JSON, one line per VM (kvmhost docs json)")
    return parser
