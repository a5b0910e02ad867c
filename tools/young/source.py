"""Where the analysing commands take windows from: a record, a running VM, or a process."""

from __future__ import annotations

import argparse
import contextlib
import threading
import typing
from collections.abc import Iterator
from pathlib import Path

from kvmhost.errors import LayoutError
from kvmhost.temporary import temporary_folder
from kvmhost.tools.vocabulary import add_option
from kvmhost.tools.young.common import add_process_arguments, open_source, progress_bar
from kvmhost.tools.young.output import open_record

if typing.TYPE_CHECKING:
    from kvmhost.reclaim.record.reader import YoungRecord

__all__ = ["add_windows_source", "is_record", "open_windows"]

_INTERVAL_S, _COUNT = 1.0, 30


def is_record(source: str | None) -> bool:
    """Return whether a source is a record; a VM is given by its name or its socket's path."""
    if source is None:
        return False
    path = Path(source)
    return path.is_dir() or path.suffix == ".young" or ("/" in source and not path.is_socket())


def add_windows_source(parser: argparse.ArgumentParser) -> None:
    """Add SOURCE or --pid, and how a source that runs is recorded."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="a record of young record, or a running VM: its name, or the path of its socket",
    )
    add_process_arguments(parser)
    add_option(
        parser,
        "--interval",
        default=None,
        help=f"of a VM or process: length of a window (default: {_INTERVAL_S:g}s)",
    )
    add_option(
        parser,
        "--count",
        help=f"of a VM or process: number of windows to record first (default: {_COUNT})",
    )
    add_option(
        parser,
        "--tracker",
        help="of a VM or process: auto (the one in use, or the best), or one that doctor lists",
    )


@contextlib.contextmanager
def open_windows(args: argparse.Namespace) -> Iterator[YoungRecord]:
    """Open the record that the arguments of :func:`add_windows_source` name.

    Of a VM or process, one is made first, in a temporary directory that is then removed.

    :raises LayoutError: if they name nothing or two sources
    :raises VmGoneError: if the VM or process does not exist, or ends before the first window
    """
    if args.pid is None and is_record(args.source):
        if args.interval is not None or args.count is not None:
            raise LayoutError("--interval and --count apply to what runs, not to a record")
        with open_record(Path(args.source)) as record:
            yield record
        return
    with temporary_folder("kvmhost-young-") as folder:
        path = folder / "record.young"
        _record(args, path)
        with open_record(path) as record:
            yield record


def _record(args: argparse.Namespace, path: Path) -> None:
    from kvmhost.reclaim.record.chunks import need_zstd
    from kvmhost.reclaim.record.recorder import RecordingPlan, record_vm

    need_zstd()
    n_windows = args.count or _COUNT
    plan = RecordingPlan(
        args.interval or _INTERVAL_S, n_windows, args.tracker, getattr(args, "range", None)
    )
    with (
        open_source(args.source, args.pid, args.mapping) as vm,
        progress_bar(n_windows, "recording") as advance,
    ):
        record_vm(vm, path, plan, threading.Event(), advance)
