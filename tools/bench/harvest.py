"""``kvmhost bench harvest``: the speed of trackers on a 1 GiB guest, and the guest's loss.

The guest touches a hot set repeatedly: it reads, or writes if the tracker sees writes
only. For each tracker the benchmark measures a scan of all pages, clearing and re-arming
the hot pages, and the guest's throughput with one harvest per second and with none, in
turn. A re-armed page costs the guest one fault on its next touch, which cannot be
avoided. The lost time is therefore compared with (hot pages x the bare cost of such a
fault), which is measured in the same run by re-arming the hot set between two epochs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from kvmhost.errors import LayoutError
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.suggest import unknown_name
from kvmhost.tools.accuracy.kinds import GFN_START, KINDS, TrackerKind, probe_kinds
from kvmhost.tools.args import about
from kvmhost.tools.bench.bounds import BOUNDS
from kvmhost.tools.measured import bench_head
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.bench import HarvestOutput, HarvestParameters, TrackerRow
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import Progress
from kvmhost.tools.throughput import ThroughputPlan, measure_steps, paired_rates
from kvmhost.tools.vocabulary import add_option, listing, one_of
from kvmhost.units import PAGE_BYTES

__all__ = ["LOST_BOUND", "hot_machine", "main", "parser", "run"]

#: Upper bound on the lost time, as a multiple of the bare re-faults.
LOST_BOUND = BOUNDS["harvest.lost_of_bare_refault_ratio"].limit
_STEPS = 5


def run(
    mem_bytes: int = 1 << 30,
    hot_bytes: int | None = None,
    duration_s: float = 1.0,
    rounds: int = 9,
    trackers: Sequence[str] = (),
) -> HarvestOutput:
    """Measure every tracker that works on this host.

    :param hot_bytes: memory that the guest touches; None: a tenth of it
    :param duration_s: length of a segment; segments without harvests precede and follow it
    :raises LayoutError: for an unknown tracker
    :raises CapabilityError: without /dev/kvm
    """
    hot = (mem_bytes // 10 if hot_bytes is None else hot_bytes) // PAGE_BYTES
    if not 0 < hot <= mem_bytes // PAGE_BYTES - GFN_START:
        raise LayoutError(f"--hot: {hot} pages do not fit into --mem of {mem_bytes >> 20} MiB")
    support = probe_kinds("kvm")
    for name in trackers:
        if name not in KINDS:
            raise LayoutError(unknown_name("tracker", name, KINDS))
    progress, rows = Progress(), []
    for name in trackers or KINDS:
        if support[name].works:
            progress.say(name)
            rows.append(_measure(KINDS[name], mem_bytes, hot, duration_s, rounds))
    parameters = HarvestParameters(
        mem_bytes=mem_bytes, hot_pages=hot, duration_s=duration_s, rounds=rounds
    )
    return HarvestOutput(**bench_head("harvest"), parameters=parameters, trackers=rows)


def hot_machine(kind: TrackerKind, mem_bytes: int, hot: int) -> Machine:
    """Make a machine that touches its first ``hot`` pages without end and stops at doorbells."""
    params = {"gfn_start": GFN_START, "pages": hot, "epochs": 0, "write": int(kind.only_writes)}
    machine = Machine(
        image_path("touch"),
        mem_bytes=mem_bytes,
        engine="kvm",
        params=params,
        dirty_ring_entries=kind.large_ring_entries,
    )
    machine.step_by_doorbell()
    return machine


def _measure(
    kind: TrackerKind, mem_bytes: int, hot: int, seconds: float, rounds: int
) -> TrackerRow:
    once_a_second = ThroughputPlan(1.0)
    with hot_machine(kind, mem_bytes, hot) as machine:
        machine.run_epoch()
        tracker = kind.use(machine)
        steps = measure_steps(machine, tracker, GFN_START, hot, _STEPS)
        machine.step_by_doorbell(False)
        kept = paired_rates(
            machine, tracker, [once_a_second], rounds, seconds / 2, lambda plan: seconds
        )[once_a_second]
    lost = 1 - statistics.median(one.wall for one in kept)
    lost_by_cpu = 1 - statistics.median(one.cpu for one in kept)
    bound = hot * steps.refault_ns / 1e9
    return TrackerRow(
        tracker=kind.name,
        scan_ns_per_page=steps.scan_ns / (mem_bytes // PAGE_BYTES),
        rearm_ns_per_page=steps.rearm_ns / hot,
        refault_ns_per_page=steps.refault_ns,
        lost_share=lost,
        min_lost_share=1 - max(one.wall for one in kept),
        max_lost_share=1 - min(one.wall for one in kept),
        lost_by_cpu_share=lost_by_cpu,
        bare_refault_s=bound,
        lost_of_bare_refault_ratio=lost / bound,
        lost_by_cpu_of_bare_refault_ratio=lost_by_cpu / bound,
    )


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost bench harvest",
        description=about(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_option(parser, "--mem", default="1G")
    add_option(parser, "--duration")
    add_option(parser, "--rounds", default=9, help="segments of each kind")
    add_option(parser, "--hot")
    add_option(
        parser,
        "--tracker",
        **listing(one_of("tracker", tuple(KINDS))),
        help="trackers to measure (default: all that see reads)",
    )
    add_option(parser, "--json")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the figures as a table, or as JSON."""
    options = parser().parse_args(argv)
    result = run(
        options.mem,
        options.hot.of(options.mem),
        options.duration,
        options.rounds,
        options.tracker or (),
    )
    if options.json:
        emit(result)
        return 0
    given = result.parameters
    print(f"guest of {given.mem_bytes >> 20} MiB, {given.hot_pages} hot pages")
    for row in result.trackers:
        print(
            f"{row.tracker:10} scan {row.scan_ns_per_page:5.2f} ns a page, "
            f"clear and re-arm {row.rearm_ns_per_page:5.0f} ns a hot page, "
            f"bare re-fault {row.refault_ns_per_page:5.0f} ns\n"
            f"           one harvest a second: {row.lost_share * 1000:.0f} ms lost a second "
            f"({row.min_lost_share * 1000:.0f} to {row.max_lost_share * 1000:.0f}), "
            f"{row.lost_of_bare_refault_ratio:.2f} times the bare re-faults (bound {LOST_BOUND}); "
            f"by the vCPU's processor time {row.lost_by_cpu_of_bare_refault_ratio:.2f}"
        )
    return 0
