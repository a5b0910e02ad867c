"""Shared by the commands of ``kvmhost young``: arguments, ranges, output files."""

from __future__ import annotations

import argparse
import contextlib
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvmhost.control.schema import MemoryMap
from kvmhost.errors import LayoutError
from kvmhost.files import check_target
from kvmhost.tools.args import count
from kvmhost.tools.vocabulary import add_option

if typing.TYPE_CHECKING:
    from kvmhost.control.client import Client
    from kvmhost.process.attach import Attached

__all__ = [
    "add_process_arguments",
    "add_source_arguments",
    "add_vm_arguments",
    "check_out",
    "open_source",
    "percent",
    "progress_bar",
    "range_of",
]


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select a VM or another process: VM or --pid, and --mapping."""
    parser.add_argument("vm", metavar="VM", nargs="?", help="name of a VM, or path of its socket")
    add_process_arguments(parser)


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --pid and --mapping."""
    parser.add_argument(
        "--pid",
        type=count,
        metavar="PID",
        help="instead: a process that is not ours, such as QEMU with a memfd for memory; "
        "trackers are then auto, idle, pageout, written, soft-dirty, present "
        "(docs/trackers.md says what each changes there), and gfns count from its start",
    )
    parser.add_argument(
        "--mapping",
        default="",
        metavar="WORD",
        help="with --pid: which shared mapping, by an address in hex or a part of its path "
        "(default: the largest one of memory)",
    )


def open_source(vm: str | None, pid: int | None, mapping: str) -> Client | Attached:
    """Open a VM, or a process by its pid.

    :raises LayoutError: if both or neither are given, or the process is unsuitable
    :raises CapabilityError: if access to the process is not permitted
    """
    if (vm is None) == (pid is None):
        raise LayoutError("give the name of a VM, or --pid PID; one of both")
    if pid is None:
        if mapping:
            raise LayoutError("--mapping goes with --pid")
        from kvmhost.control.client import Client

        assert vm is not None
        return Client(vm)
    from kvmhost.process.attach import Attached

    return Attached(pid, mapping)


def add_vm_arguments(parser: argparse.ArgumentParser, *, or_pid: bool = False) -> None:
    """Add VM (or --pid), --tracker and --range."""
    if or_pid:
        add_source_arguments(parser)
    else:
        parser.add_argument("vm", metavar="VM", help="name of a VM, or path of its socket")
    add_option(
        parser, "--tracker", help="auto (the one in use, or the best), or one that doctor lists"
    )
    add_option(parser, "--range")


def range_of(given: tuple[int, int] | None, memory: MemoryMap) -> tuple[int, int]:
    """Return (first gfn, pages).

    :raises LayoutError: for a range that is empty or ends above guest memory
    """
    start, end = given or (0, memory.gfn_end)
    if not 0 <= start < end <= memory.gfn_end:
        raise LayoutError(f"--range {start:#x}:{end:#x}: memory has gfns [0, {memory.gfn_end:#x})")
    return start, end - start


def check_out(path: Path, kinds: Sequence[str]) -> None:
    """Check that an output file can be written, before any work is done.

    :raises LayoutError: for a file name of another kind
    :raises HostError: if no file can be written at ``path``
    """
    if path.suffix.lower() not in kinds:
        raise LayoutError(f"{path}: the name must end in {' or '.join(kinds)}")
    check_target(path)


@contextlib.contextmanager
def progress_bar(total: int, what: str = "harvesting") -> Iterator[Callable[[], None]]:
    """Show a progress bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def percent(part: int, whole: int) -> str:
    """Return a share as text, such as ``12.5 %``."""
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
