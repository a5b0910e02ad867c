"""``kvmhost bench snapshot``: snapshot of a VM that evicts, compared with ``cp`` of the file.

The guest continuously writes and checks pages, and uses twice as much memory as its
resident limit allows. Two steps take turns in one run: a live snapshot (pause, state,
memory from memfd and store, file on disk, resume), and ``cp`` of the resulting file, which
is in the page cache, to another name in the same directory, followed by fsync of the copy.
A ratio above 1 means that the snapshot was faster.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.machine.restore import restore_machine
from kvmhost.machine.snapshot import save_machine
from kvmhost.pager.pager import Pager
from kvmhost.temporary import temporary_folder
from kvmhost.tools.args import about
from kvmhost.tools.bench.bounds import BOUNDS
from kvmhost.tools.measured import bench_head
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.bench import SnapshotBenchOutput, SnapshotParameters
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option
from kvmhost.units import PAGE_BYTES

__all__ = ["main", "parser", "run"]

_GFN_START = 4096
_WARM_UP_S = 300.0


def run(mem_bytes: int, rounds: int, directory: Path | None = None) -> SnapshotBenchOutput:
    """Measure.

    :param mem_bytes: guest memory; half of what the guest uses may be resident
    :raises GuestError: if the guest finds a wrong byte
    """
    n_pages = mem_bytes // PAGE_BYTES - 2 * _GFN_START
    limit = n_pages // 2
    with temporary_folder("kvmhost-bench-", directory) as folder:
        with _evicting_guest(mem_bytes, n_pages, limit) as (machine, pager):
            turns = [_turn(machine, folder) for _ in range(rounds)]
            counters = pager.counters()
        start = time.monotonic()
        restore_machine(folder / "vm.snap").close()
        restored_s = time.monotonic() - start
    save, cp, synced, n_bytes = zip(*turns, strict=True)
    return SnapshotBenchOutput(
        **bench_head("snapshot"),
        parameters=SnapshotParameters(mem_bytes=mem_bytes, rounds=rounds),
        resident_max_bytes=limit * PAGE_BYTES,
        evicted_bytes=counters["evicted_pages"] * PAGE_BYTES,
        fault_ins=counters["fault_ins"],
        file_bytes=n_bytes[-1],
        save_s=statistics.median(save),
        cp_s=statistics.median(cp),
        cp_fsync_s=statistics.median(synced),
        restore_s=restored_s,
        save_mib_per_s=statistics.median(
            n / s / (1 << 20) for n, s in zip(n_bytes, save, strict=True)
        ),
        speed_of_cp_ratio=_speed(save, cp),
        speed_of_cp_fsync_ratio=_speed(save, synced),
    )


def _speed(save: Sequence[float], other: Sequence[float]) -> float:
    """Return how many times faster a snapshot is: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(save, other, strict=True))


@contextlib.contextmanager
def _evicting_guest(mem_bytes: int, n_pages: int, limit: int) -> Iterator[tuple[Machine, Pager]]:
    params = {"gfn_start": _GFN_START, "pages": n_pages, "hot": limit // 4, "epochs": 0}
    params |= {"scan_every": 4, "scan_epochs": 1}
    with Machine(
        image_path("hotcold"), mem_bytes=mem_bytes, engine="kvm", params=params
    ) as machine:
        pager = machine.open_pager()
        pager.set_limit(limit * PAGE_BYTES)
        machine.start()
        deadline = time.monotonic() + _WARM_UP_S
        # Wait until the guest has touched all pages, and refaults evicted ones.
        while time.monotonic() < deadline:
            counters = pager.counters()
            if counters["evicted_pages"] > n_pages - limit - 64 and counters["fault_ins"] > limit:
                break
            _raise_error(machine)
            time.sleep(0.05)
        yield machine, pager
        _raise_error(machine)


def _raise_error(machine: Machine) -> None:
    if machine.error is not None:
        raise machine.error


def _turn(machine: Machine, folder: Path) -> tuple[float, float, float, int]:
    file, copy = folder / "vm.snap", folder / "copy"
    # Freed blocks may be discarded on the disk at the next fsync of any process.
    for old in (file, copy):
        old.unlink(missing_ok=True)
    os.sync()
    start = time.monotonic()
    save_machine(machine, file)
    saved = time.monotonic() - start
    with machine.stopped_vcpus():
        _read_through(file)
        start = time.monotonic()
        subprocess.run(["cp", str(file), str(copy)], check=True)
        copied = time.monotonic() - start
        fd = os.open(copy, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        synced = time.monotonic() - start
    return saved, copied, synced, file.stat().st_size


def _read_through(file: Path) -> None:
    with file.open("rb", buffering=0) as source:
        while source.read(1 << 20):
            continue


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(prog="kvmhost bench snapshot", description=about(__doc__))
    add_option(parser, "--mem", default="512M")
    add_option(parser, "--rounds", default=5, help="snapshots, each followed by a copy")
    parser.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="where the files are written and removed (default: $TMPDIR)",
    )
    add_option(parser, "--json")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    result = run(args.mem, args.rounds, args.directory)
    if args.json:
        emit(result)
    else:
        print(_text(result))
    return 0


def _text(result: SnapshotBenchOutput) -> str:
    mib = 1 << 20
    return "\n".join(
        [
            f"guest: {result.parameters.mem_bytes / mib:.0f} MiB, resident at most "
            f"{result.resident_max_bytes / mib:.0f} MiB, evicted "
            f"{result.evicted_bytes / mib:.0f} MiB, {result.fault_ins} fault-ins",
            f"live snapshot:  {result.save_s:.3f} s median of {result.parameters.rounds}, "
            f"{result.file_bytes / mib:.0f} MiB, {result.save_mib_per_s:.0f} MiB/s",
            f"cp:             {result.cp_s:.3f} s; with fsync {result.cp_fsync_s:.3f} s",
            f"restore:        {result.restore_s:.3f} s, under the same limit",
            f"speed of the snapshot relative to cp with fsync: "
            f"{result.speed_of_cp_fsync_ratio:.2f} ({BOUNDS['snapshot.speed_of_cp_fsync_ratio']}); "
            f"without: {result.speed_of_cp_ratio:.2f}",
        ]
    )
