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
from typing import Any

from kvmhost.errors import CapabilityError
from kvmhost.machine import make_machine
from kvmhost.temporary import temporary_folder
from kvmhost.tools.args import about
from kvmhost.tools.bench.bounds import BOUNDS
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
) -> dict[str, Any]:
    """Measure; medians in seconds, sizes in bytes.

    :raises ImageError: if the image cannot be loaded
    :raises CapabilityError: if the other VMM is requested but not installed
    """
    if image is not None:
        make_machine(image, engine=engine).close()
    with temporary_folder("kvmhost-bench-") as folder:
        file = image or _hello_image(folder)
        times = _processes(_commands(engine, file, qemu), rounds)
        result: dict[str, Any] = {"rounds": rounds, "engine": engine, "image": str(file)}
        result |= {f"{name}_s": statistics.median(taken) for name, taken in times.items()}
        result |= {f"{name}_max_s": max(taken) for name, taken in times.items()}
        result["image_beyond_python_s"] = result["image_s"] - result["python_s"]
        if qemu:
            ratios = (a / b for a, b in zip(times["image"], times["qemu"], strict=True))
            result["image_to_qemu"] = statistics.median(ratios)
        result |= _first_instruction(max(rounds * 5, 20), folder) | _memory(engine)
    return result


def _commands(engine: EngineName, image: Path, qemu: bool) -> dict[str, list[str]]:
    kvmhost = [sys.executable, "-m", "kvmhost", "run"]
    commands = {
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


def _processes(commands: dict[str, list[str]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in commands}
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


def _first_instruction(times: int, folder: Path) -> dict[str, float]:
    """Time from creating a machine to its first exit; return nothing without KVM."""
    from kvmhost.boot.plain import parse_flat
    from kvmhost.engine.base import Vcpu
    from kvmhost.exits import IoOut
    from kvmhost.kvm.system import probe
    from kvmhost.machine.pc import PcMachine
    from kvmhost.machine.runner import Step

    if probe() is not None:
        return {}

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
    return {
        "first_exit_median_s": statistics.median(taken),
        "first_exit_p99_s": taken[min(len(taken) - 1, int(len(taken) * 0.99))],
    }


def _memory(engine: EngineName) -> dict[str, int]:
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
    guest = report["resident_bytes"]
    return {
        "hello_peak_rss_bytes": report["peak_rss_bytes"],
        "hello_guest_bytes": guest,
        "hello_beyond_guest_bytes": report["peak_rss_bytes"] - guest,
    }


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
    print(json.dumps(result, indent=2) if options.json else _text(result))
    return 0


def _text(result: dict[str, Any]) -> str:
    mib = 1 << 20
    rows = [
        ("python -c pass", "python"),
        ("kvmhost run hello", "hello"),
        ("kvmhost run IMAGE", "image"),
        ("the image under qemu", "qemu"),
    ]
    lines = [
        f"{label + ':':<24}{result[f'{key}_s']:.3f} s median of {result['rounds']}, "
        f"{result[f'{key}_max_s']:.3f} s at most"
        for label, key in rows
        if f"{key}_s" in result
    ]
    lines.append(
        f"image beyond python:    {result['image_beyond_python_s']:.3f} s "
        f"({BOUNDS['start.image_beyond_python_s']})"
    )
    if "image_to_qemu" in result:
        lines.append(
            f"image, kvmhost to qemu: {result['image_to_qemu']:.3f} "
            f"({BOUNDS['start.image_to_qemu']})"
        )
    if "first_exit_median_s" in result:
        lines.append(
            f"create to first exit:   {result['first_exit_median_s'] * 1e3:.1f} ms median, "
            f"{result['first_exit_p99_s'] * 1e3:.1f} ms p99"
        )
    lines.append(
        f"memory of run hello:    {result['hello_peak_rss_bytes'] / mib:.1f} MiB at most, "
        f"{result['hello_beyond_guest_bytes'] / mib:.1f} MiB beyond the guest's own "
        f"({BOUNDS['start.hello_beyond_guest_mib']})"
    )
    return "\n".join(lines)
