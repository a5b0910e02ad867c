"""``kvmhost bench start``: the time to start a guest, and the memory of a VM process.

The benchmark measures the wall time of whole processes, in turn: ``run hello`` (a tiny
guest), a multiboot image that prints a line and exits (or ``--image``), the same file
under another VMM if there is one (``--qemu``), and the same interpreter doing nothing,
which is a lower bound for kvmhost. It also measures, within one process, the time from
the call that creates a machine to the exit of its first instructions, and the memory of
a VM process.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kvmhost.errors import CapabilityError
from kvmhost.machine import make_machine
from kvmhost.temporary import temporary_folder
from kvmhost.tools.args import about
from kvmhost.tools.bench.bounds import BOUNDS
from kvmhost.tools.measured import bench_head
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.bench import ProcessName, ProcessRow, StartOutput, StartParameters
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import working
from kvmhost.tools.vocabulary import add_option
from kvmhost.vm.names import EngineName

__all__ = ["main", "parser", "run"]

QEMU = "qemu-system-x86_64"
HELLO_MEM_BYTES = 128 << 20
#: mov $0xf4, %dx ; out %al, %dx: the second instruction is the exit.
_EXIT_CODE = b"\x66\xba\xf4\x00\xee\xf4"


def run(
    rounds: int = 10, engine: EngineName = "auto", image: Path | None = None, qemu: bool = False
) -> StartOutput:
    """Measure.

    :raises ImageError: if the image cannot be loaded
    :raises CapabilityError: if the other VMM is requested but not installed
    """
    if image is not None:
        make_machine(image, engine=engine).close()
    with temporary_folder("kvmhost-bench-") as folder:
        file = image or _hello_image(folder)
        times = _processes(_commands(engine, file, qemu), rounds)
        first_s, p99_s = _first_exit(max(rounds * 5, 20), folder)
        peak_rss_bytes, guest_bytes = _memory(engine)
    median_s = {name: statistics.median(taken) for name, taken in times.items()}
    return StartOutput(
        **bench_head("start"),
        parameters=StartParameters(rounds=rounds, engine=engine, image=str(file)),
        processes=[
            ProcessRow(process=name, median_s=median_s[name], max_s=max(taken))
            for name, taken in times.items()
        ],
        image_beyond_python_s=median_s["image"] - median_s["python"],
        image_of_qemu_ratio=_ratio(times["image"], times["qemu"]) if qemu else None,
        first_exit_s=first_s,
        p99_first_exit_s=p99_s,
        hello_peak_rss_bytes=peak_rss_bytes,
        hello_guest_bytes=guest_bytes,
        hello_beyond_guest_bytes=peak_rss_bytes - guest_bytes,
    )


def _ratio(values: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def _commands(engine: EngineName, image: Path, qemu: bool) -> dict[ProcessName, list[str]]:
    kvmhost = [sys.executable, "-m", "kvmhost", "run"]
    commands: dict[ProcessName, list[str]] = {
        "python": [sys.executable, "-c", "pass"],
        "hello": [*kvmhost, "hello", "--engine", engine],
        "image": [*kvmhost, str(image)],
    }
    if qemu:
        if shutil.which(QEMU) is None:
            raise CapabilityError("qemu", QEMU, "no such program", "run .ci/packages as root")
        commands["qemu"] = [
            QEMU, "-accel", "kvm", "-nodefaults", "-no-reboot", "-vnc", "none", "-device",
            "isa-debug-exit,iobase=0xf4,iosize=0x4", "-serial", "stdio", "-kernel", str(image),
        ]  # fmt: skip
    return commands


def _hello_image(folder: Path) -> Path:
    from kvmhost.guests.build import compile_pc_guest, pc_sources

    (source,) = (path for path in pc_sources() if path.stem == "hello")
    return compile_pc_guest(source, folder / "hello.flat")


def _processes(
    commands: dict[ProcessName, list[str]], rounds: int
) -> dict[ProcessName, list[float]]:
    times: dict[ProcessName, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            start = time.perf_counter()
            # The exit status depends on the image; the output shows whether it started.
            subprocess.run(
                command,
                check=name in ("python", "hello"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            times[name].append(time.perf_counter() - start)
    return times


def _first_exit(times: int, folder: Path) -> tuple[float, float] | tuple[None, None]:
    """Return median and 99th percentile from creating a machine to its first exit, with KVM."""
    from kvmhost.boot.plain import parse_flat
    from kvmhost.engine.base import Vcpu
    from kvmhost.exits import IoOut
    from kvmhost.kvm.system import probe
    from kvmhost.machine.pc import PcMachine
    from kvmhost.machine.runner import Step

    if probe() is not None:
        return None, None

    class Timed(PcMachine):
        """Records the time of the first exit."""

        first_s = 0.0

        def handle_port_write(self, vcpu: Vcpu, vm_exit: IoOut) -> Step:
            self.first_s = self.first_s or time.perf_counter()
            return super().handle_port_write(vcpu, vm_exit)

    image, taken = parse_flat(str(folder / "exit"), _EXIT_CODE, "flat32"), []
    for _ in range(times):
        start = time.perf_counter()
        with Timed(image) as machine:
            machine.start()
            machine.wait(60)
            taken.append(machine.first_s - start)
    taken.sort()
    return statistics.median(taken), taken[min(len(taken) - 1, int(len(taken) * 0.99))]


def _memory(engine: EngineName) -> tuple[int, int]:
    """Return the peak resident memory of ``run hello``, and the guest's part of it."""
    command = [
        sys.executable,
        "-m",
        "kvmhost.tools.main",
        "run",
        "hello",
        "--json",
        "--engine",
        engine,
    ]
    done = subprocess.run(
        [*command, "--mem", str(HELLO_MEM_BYTES)], check=True, capture_output=True, text=True
    )
    report = json.loads(done.stdout)
    return report["peak_rss_bytes"], report["resident_bytes"]


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(prog="kvmhost bench start", description=about(__doc__))
    add_option(parser, "--rounds", default=10, help="starts of each process")
    add_option(parser, "--engine")
    parser.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="a multiboot image (default: one that prints a line)",
    )
    parser.add_argument("--qemu", action="store_true", help="also start the image under QEMU")
    add_option(parser, "--json")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the figures as text, or as JSON."""
    options = parser().parse_args(argv)
    with working("bench start"):
        result = run(options.rounds, options.engine, options.image, options.qemu)
    if options.json:
        emit(result)
    else:
        print(_text(result))
    return 0


_LABELS: dict[ProcessName, str] = {
    "python": "python -c pass",
    "hello": "kvmhost run hello",
    "image": "kvmhost run IMAGE",
    "qemu": "the image under qemu",
}


def _text(result: StartOutput) -> str:
    mib = 1 << 20
    lines = [
        f"{_LABELS[row.process] + ':':<24}{row.median_s:.3f} s median of "
        f"{result.parameters.rounds}, {row.max_s:.3f} s at most"
        for row in result.processes
    ]
    lines.append(
        f"image beyond python:    {result.image_beyond_python_s:.3f} s "
        f"({BOUNDS['start.image_beyond_python_s']})"
    )
    if result.image_of_qemu_ratio is not None:
        lines.append(
            f"image, kvmhost to qemu: {result.image_of_qemu_ratio:.3f} "
            f"({BOUNDS['start.image_of_qemu_ratio']})"
        )
    if result.first_exit_s is not None and result.p99_first_exit_s is not None:
        lines.append(
            f"create to first exit:   {result.first_exit_s * 1e3:.1f} ms median, "
            f"{result.p99_first_exit_s * 1e3:.1f} ms p99"
        )
    lines.append(
        f"memory of run hello:    {result.hello_peak_rss_bytes / mib:.1f} MiB at most, "
        f"{result.hello_beyond_guest_bytes / mib:.1f} MiB beyond the guest's own "
        f"({BOUNDS['start.hello_beyond_guest_bytes']})"
    )
    return "\n".join(lines)
