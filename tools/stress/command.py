"""``kvmhost stress``: fill KVM's page tables, and change memory under running vCPUs.

After the kernel's selftest mmu_stress_test. vCPUs write all of a large guest, which sees one
piece of memory in many memslots, in phases with a rendezvous between two: run1, reset, run2,
read-only, writable again, deletion of every other memslot, unmapping, release. What has to
hold is checked: after mprotect every write faults, and none arrives. Exit code 1 if a check
fails. kvmhost docs stress has the phases and figures.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from kvmhost import engine as engines
from kvmhost.memory.layout import MAX_TINY_VCPUS
from kvmhost.tools.args import about, size_bytes
from kvmhost.tools.ending import EXIT_FAILED
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.stress import (
    CheckRow,
    ReferenceRow,
    StressOutput,
    StressPhaseRow,
)
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import Progress, show_columns
from kvmhost.tools.stress.against import command_line, run_selftest
from kvmhost.tools.stress.machine import Sizes, StressMachine
from kvmhost.tools.stress.phases import PHASES, Check, StressPhase, run_phases
from kvmhost.tools.stress.reference import REFERENCES
from kvmhost.tools.vocabulary import add_option
from kvmhost.units import size_text
from kvmhost.vm.names import EngineName

__all__ = ["main", "parser", "run"]

_KERNELS_PHASES = ("run1", "reset", "run2", "ro", "rw")
#: Default of --mem and --slot-size by engine.
_DEFAULTS = {"kvm": (256 << 20, 64 << 20), "emulated": (16 << 20, 4 << 20)}


def run(
    sizes: Sizes,
    *,
    engine: EngineName = "auto",
    stop: bool = False,
    timeout_s: float = 600.0,
    selftest: Path | None = None,
) -> StressOutput:
    """Run the phases, and the kernel's selftest after them; return what was found.

    :param stop: each vCPU waits at its first fault, instead of skipping the store
    :raises LayoutError: if sizes do not fit
    :raises CapabilityError: if this host lacks something for them
    :raises GuestTimeout: if it takes longer
    """
    command = None
    if selftest is not None:
        command = command_line(
            selftest, sizes.span_bytes, sizes.slot_bytes, sizes.n_vcpus, sizes.huge
        )
    progress = Progress()
    with StressMachine(sizes, engine=engine, stop=stop) as machine:
        chosen = machine.engine.name
        phases, checks = run_phases(machine, timeout_s, progress.say)
    rows = [
        ReferenceRow(name=r.name, source=r.source, taken_s=dict(r.taken_s))
        for r in REFERENCES["stop" if stop else "skip"]
    ]
    if command is not None:
        progress.say(f"the selftest {command[0]}")
        times = run_selftest(command, timeout_s)
        rows.insert(0, ReferenceRow(name="selftest", source=" ".join(command), taken_s=times))
    return _output(sizes, chosen, stop, phases, checks, rows)


def _output(
    sizes: Sizes,
    engine: EngineName,
    stop: bool,
    phases: Sequence[StressPhase],
    checks: Sequence[Check],
    references: list[ReferenceRow],
) -> StressOutput:
    run1_s = phases[0].taken_s
    return StressOutput(
        ok=all(check.ok for check in checks),
        engine=engine,
        n_vcpus=sizes.n_vcpus,
        mem_bytes=sizes.span_bytes,
        slot_bytes=sizes.slot_bytes,
        n_slots=sizes.n_slots,
        huge=sizes.huge,
        on_fault="stop" if stop else "skip",
        phases=[
            StressPhaseRow(
                name=phase.name,
                what=PHASES[phase.name],
                taken_s=phase.taken_s,
                of_run1_ratio=phase.taken_s / run1_s,
                n_faults=phase.n_faults,
            )
            for phase in phases
        ],
        checks=[CheckRow(name=c.name, ok=c.ok, detail=c.detail) for c in checks],
        references=references,
    )


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(prog="kvmhost stress", description=about(__doc__))
    add_option(parser, "--engine")
    add_option(
        parser,
        "--vcpus",
        short="-c",
        default=None,
        help=f"number of vCPUs, up to {MAX_TINY_VCPUS} (default: one for each processor)",
    )
    add_option(
        parser,
        "--mem",
        short="-m",
        default=None,
        help="memory that the guest sees (default: 256M, on the emulated engine 16M)",
    )
    parser.add_argument(
        "-s",
        "--slot-size",
        type=size_bytes,
        metavar="SIZE",
        help="size of a memslot, and memory of the host behind all of them, a multiple of 2M "
        "(default: a quarter of --mem, at most 2G)",
    )
    parser.add_argument(
        "--huge", action="store_true", help="back the memory with huge pages of 2 MiB"
    )
    parser.add_argument(
        "--on-fault",
        choices=("skip", "stop"),
        default="skip",
        help="what a vCPU does at a write to read-only memory: skip the instruction and go on, so "
        "that every write is seen to fault, or stop until it is writable (default: skip)",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="PATH",
        help="also run the kernel's own mmu_stress_test, which was built at PATH, with the same "
        "sizes (whole GiB), and show its times beside",
    )
    add_option(parser, "--timeout", default="10m", help="give up after this time")
    add_option(parser, "--json")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the phases and print times, ratios and checks."""
    args = parser().parse_args(argv)
    output = run(
        _sizes(args),
        engine=args.engine,
        stop=args.on_fault == "stop",
        timeout_s=args.timeout,
        selftest=args.against,
    )
    if args.json:
        emit(output)
    else:
        _show(output)
    return 0 if output.ok else EXIT_FAILED


def _sizes(args: argparse.Namespace) -> Sizes:
    mem_bytes, slot_bytes = args.mem, args.slot_size
    if mem_bytes is None:
        default, default_slot = _DEFAULTS[_engine_name(args.engine)]
        mem_bytes = default if slot_bytes is None else max(default, 4 * slot_bytes)
        slot_bytes = slot_bytes or default_slot
    if slot_bytes is None:
        slot_bytes = min(max(mem_bytes // 4 // _STEP * _STEP, _STEP), 2 << 30)
    n_vcpus = args.vcpus or min(len(os.sched_getaffinity(0)), MAX_TINY_VCPUS)
    return Sizes(mem_bytes, slot_bytes, n_vcpus, args.huge)


def _engine_name(name: EngineName) -> EngineName:
    """Return the engine that ``auto`` means here."""
    if name != "auto":
        return name
    engine = engines.choose(name)
    engine.close()
    return engine.name


_STEP = 2 << 20


def _show(output: StressOutput) -> None:
    huge = ", huge pages" if output.huge else ""
    vcpus = f"{output.n_vcpus} vCPU{'s' * (output.n_vcpus > 1)}"
    print(
        f"{size_text(output.mem_bytes)} of guest in {output.n_slots} memslots over "
        f"{size_text(output.slot_bytes)} of memory{huge}, {vcpus}, "
        f"engine {output.engine}, on a fault: {output.on_fault}\n"
    )
    _show_phases(output)
    times = {row.name: row.taken_s for row in output.phases}
    # As the kernel's test prints them.
    print("\n" + ", ".join(f"{name} = {times[name]:.9f}s" for name in _KERNELS_PHASES) + "\n")
    for row in output.references:
        print(f"{row.name}: {row.source}")
    failed = [row for row in output.checks if not row.ok]
    for check in failed:
        print(f"FAILED {check.name}: {check.detail}")
    print(f"\n{len(output.checks) - len(failed)} of {len(output.checks)} checks hold")


def _show_phases(output: StressOutput) -> None:
    names = [row.name for row in output.references]
    heads = ["phase", "seconds", "of run1", "faults"]
    heads += [head for name in names for head in (name, "of run1")]
    rows = []
    for row in output.phases:
        cells = [row.name, f"{row.taken_s:.4f}", f"{row.of_run1_ratio:.4g}", f"{row.n_faults:,}"]
        for reference in output.references:
            cells += _reference_cells(reference, row.name)
        rows.append(cells)
    show_columns(heads, rows)


def _reference_cells(reference: ReferenceRow, phase: str) -> list[str]:
    seconds, run1_s = reference.taken_s.get(phase), reference.taken_s.get("run1")
    if seconds is None:
        return ["", ""]
    return [f"{seconds:g}", f"{seconds / run1_s:.4g}" if run1_s else ""]
