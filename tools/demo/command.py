"""``kvmhost demo``: a demonstration of tracking and reclaim on a real guest.

1. the accuracy of each tracker, compared with the gfns computed from the guest's seed;
2. the cost of aging: epochs per second with and without the daemon, without a limit;
3. a guest in a memory cgroup limited to half of the memory that it touches, without the
   daemon: the kernel kills it;
4. the same guest and limit with the daemon: the guest completes and checks every byte;
5. a plot of the touched pages over time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvmhost.errors import CapabilityError, KvmHostError, LayoutError
from kvmhost.files import check_target
from kvmhost.guests import image_path
from kvmhost.guests.workloads import hotcold_gfns
from kvmhost.installing import install_hint
from kvmhost.machine import Machine
from kvmhost.pager.userfault import Userfault
from kvmhost.reclaim.pressure.cgroup import MemoryCgroup
from kvmhost.temporary import temporary_folder
from kvmhost.tools.args import about
from kvmhost.tools.demo.processes import (
    exit_status,
    has_limit,
    more_harvests,
    open_log,
    start_daemon,
    start_vm,
    wait_until,
)
from kvmhost.tools.demo.settings import GFN_START, DemoSettings
from kvmhost.tools.measured import head
from kvmhost.tools.outputs.accuracy import (
    DemoOutput,
    DemoThroughput,
    DemoTracker,
    KilledRun,
    LimitedRun,
    LimitedRuns,
)
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import Progress, show_table
from kvmhost.tools.vocabulary import add_option
from kvmhost.trackers import NAMES, describe, probe_all
from kvmhost.vm.names import EngineName

__all__ = ["main", "parser"]

_MIB = 1 << 20
#: An emulated guest is about ten times slower, so it gets less work.
_EMULATED_SHARE = 10


def main(argv: Sequence[str]) -> int:
    """Run the demo; return 0 if every part had the expected result."""
    args = parser().parse_args(argv)
    engine = _engine_name(args.engine)
    check_target(args.out)
    # Both limited runs need it; report it now instead of later from a child process.
    Userfault().close()
    share = 1 if engine == "kvm" else _EMULATED_SHARE
    settings = DemoSettings(
        args.mem, args.hot.of(args.mem) // min(share, 4), max(args.epochs // share, 1), engine
    )
    if settings.budget_bytes < settings.hot_bytes:
        raise LayoutError(
            f"--mem {args.mem >> 20} MiB leaves a budget of {settings.budget_bytes >> 20} MiB "
            f"for a hot set of {settings.hot_bytes >> 20} MiB: give more memory or a smaller --hot"
        )
    with temporary_folder("kvmhost-demo-") as runtime:
        os.environ["KVMHOST_RUNTIME_DIR"] = str(runtime)
        report = _run(settings, args.out, Progress(args.json))
    if args.json:
        emit(report)
    else:
        _show(settings, report)
    return 0 if report.ok else 1


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost demo",
        description=about(__doc__),
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add_option(parser, "--engine")
    add_option(parser, "--mem", default="320M")
    add_option(parser, "--hot", default="15%")
    add_option(parser, "--epochs", default=300, help="epochs of the runs under the limit")
    add_option(parser, "--out", metavar="FILE.png", default="kvmhost-demo.png", help="the heatmap")
    add_option(parser, "--json")
    return parser


def _engine_name(wanted: EngineName) -> EngineName:
    with Machine(image_path("hello"), mem_bytes=4 * _MIB, engine=wanted) as machine:
        return machine.engine.name


def _run(settings: DemoSettings, picture: Path, progress: Progress) -> DemoOutput:
    progress.say(f"engine {settings.engine}: guest of {settings.mem_bytes // _MIB} MiB")
    epochs = 13
    progress.say(f"accuracy of the trackers, {epochs} epochs each")
    trackers = [_accuracy(settings, name, epochs) for name in _working_trackers(settings)]
    progress.say("guest throughput without and with the daemon, no limit; drawing the picture")
    throughput = _throughput(settings)
    heatmap = _picture(settings, picture)
    limited = _limited(settings, progress)
    return DemoOutput(
        **head(),
        engine=settings.engine,
        mem_bytes=settings.mem_bytes,
        trackers=trackers,
        throughput=throughput,
        heatmap=heatmap,
        limited=limited,
        ok=_as_expected(trackers, limited),
    )


def _working_trackers(settings: DemoSettings) -> list[str]:
    """Return the trackers that work on this host and see reads as well as writes."""
    support = probe_all(settings.engine)
    return [n for n in NAMES if support[n].works and "reads" in describe(n).sees]


# -- accuracy ------------------------------------------------------------------


def _accuracy(settings: DemoSettings, name: str, epochs: int) -> DemoTracker:
    """Return precision and recall of one harvest per epoch, on a smaller guest with a scan."""
    settings = dataclasses.replace(
        settings, mem_bytes=settings.mem_bytes // 4, hot_bytes=settings.hot_bytes // 4
    )
    params = settings.params(epochs=0) | {"scan_every": 12, "scan_epochs": 8}
    right = reported = touched = 0
    cost: list[float] = []
    with Machine(
        image_path("hotcold"), mem_bytes=settings.mem_bytes, engine=settings.engine, params=params
    ) as machine:
        machine.step_by_doorbell()
        tracker = machine.use_tracker(name)
        for epoch in range(epochs):
            machine.run_epoch()
            start = time.perf_counter_ns()
            young = tracker.harvest(GFN_START, settings.pages)
            cost.append((time.perf_counter_ns() - start) / settings.pages)
            tracker.rearm(GFN_START, settings.pages, young)
            expected = hotcold_gfns(machine.params, epoch)
            right += int(np.isin(young.gfns(), expected).sum())
            reported += young.count()
            touched += expected.size
    return DemoTracker(
        tracker=name,
        precision_ratio=right / reported if reported else 0.0,
        recall_ratio=right / touched,
        harvest_ns_per_page=statistics.median(cost),
    )


# -- throughput ------------------------------------------------------------------


def _throughput(settings: DemoSettings, seconds: float = 2.0) -> DemoThroughput:
    """Measure epochs per second of one VM without a limit, without and with the daemon in turn."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    # No scans: they would occur in some of the compared windows only.
    with start_vm(settings, "free", epochs=0, scan_every=0) as vm:
        wait_until(lambda: vm.client.state().doorbells > 2, vm, "the first epochs")
        for with_daemon in (False, True, False, True):
            with contextlib.ExitStack() as stack:
                if with_daemon:
                    budget = settings.mem_bytes
                    log = open_log(vm.directory)
                    daemon = stack.enter_context(start_daemon("free", budget, 1.0, log))
                    passes = vm.client.counters().harvest.harvests
                    wait_until(more_harvests(vm, passes), vm, "a pass", daemon)
                start, first = time.perf_counter(), vm.client.state().doorbells
                time.sleep(seconds)
                done = vm.client.state().doorbells - first
                rates[with_daemon].append(done / (time.perf_counter() - start))
    return DemoThroughput(
        alone_epochs_per_s=statistics.median(rates[False]),
        managed_epochs_per_s=statistics.median(rates[True]),
    )


def _picture(settings: DemoSettings, path: Path) -> str | None:
    """Harvest a running VM and plot gfn by time; return None without the plot extra."""
    from kvmhost.reclaim.draw.live import draw_vm
    from kvmhost.reclaim.draw.render import need_plotting
    from kvmhost.reclaim.record.chunks import need_zstd
    from kvmhost.reclaim.record.recorder import RecordingPlan

    try:
        need_plotting()
        need_zstd()
    except CapabilityError:
        return None
    with start_vm(settings, "picture", epochs=0) as vm:
        wait_until(lambda: vm.client.state().doorbells > 2, vm, "the first epochs")
        draw_vm(vm.client, path, RecordingPlan(0.08, 70, view="heatmap"), show_all=True)
    return str(path)


# -- under a limit -----------------------------------------------------------------


def _limited(settings: DemoSettings, progress: Progress) -> LimitedRuns:
    try:
        group = MemoryCgroup.create("demo", limit_bytes=settings.limit_bytes)
    except (CapabilityError, KvmHostError) as error:
        progress.say(f"no memory cgroup here ({error}): the daemon's budget is the limit")
        return _runs(settings, None, str(error), None, _managed(settings, None))
    with group:
        limit = settings.limit_bytes // _MIB
        progress.say(f"cgroup v{group.version} with a limit of {limit} MiB, without the daemon")
        alone = _alone(settings, group)
        progress.say(f"the same with the daemon, budget {settings.budget_bytes // _MIB} MiB")
        return _runs(settings, f"v{group.version}", "", alone, _managed(settings, group))


def _runs(
    settings: DemoSettings, cgroup: str | None, why: str, alone: KilledRun | None, run: LimitedRun
) -> LimitedRuns:
    return LimitedRuns(
        cgroup=cgroup,
        why=why,
        limit_bytes=settings.limit_bytes,
        budget_bytes=settings.budget_bytes,
        alone=alone,
        managed=run,
    )


def _alone(settings: DemoSettings, group: MemoryCgroup) -> KilledRun:
    before = group.oom_kills()
    with start_vm(settings, "doomed", epochs=settings.epochs, group=group) as vm:
        vm.client.resume()
        status = vm.wait_for_end()
    return KilledRun(status=status, oom_kills=group.oom_kills() - before)


def _managed(settings: DemoSettings, group: MemoryCgroup | None) -> LimitedRun:
    before = group.oom_kills() if group else 0
    peak = 0
    with (
        start_vm(settings, "kept", epochs=settings.epochs, group=group) as vm,
        start_daemon("kept", settings.budget_bytes, 0.25, open_log(vm.directory)) as daemon,
    ):
        wait_until(has_limit(vm), vm, "the daemon's limit", daemon)
        start = time.monotonic()
        vm.client.resume()

        def note_peak() -> None:
            nonlocal peak
            peak = max(peak, vm.client.state().resident_bytes)

        vm.wait_for_end(note_peak)
        seconds = time.monotonic() - start
        report = vm.report()
        # The daemon exits with status 0 after its only VM has ended.
        daemon_status = exit_status(daemon, "the daemon")
    pager = report["pager"] or {}
    stored = pager.get("evicted_pages", 0) - pager.get("same_filled_pages", 0)
    return LimitedRun(
        status=report["status"],
        duration_s=seconds,
        epochs_per_s=report["doorbells"] / seconds,
        oom_kills=(group.oom_kills() if group else 0) - before,
        evictions=pager.get("evictions", 0),
        direct_evictions=pager.get("direct_evictions", 0),
        fault_ins=pager.get("fault_ins", 0),
        refault_ratio=pager.get("fault_ins", 0) / max(1, pager.get("evictions", 0)),
        touched_bytes=settings.touched_bytes,
        peak_resident_bytes=peak,
        resident_bytes=report["resident_bytes"],
        compression_ratio=stored * 4096 / max(1, pager.get("store_bytes", 0)),
        same_filled_pages=pager.get("same_filled_pages", 0),
        daemon_status=daemon_status,
    )


# -- the table -----------------------------------------------------------------------


def _as_expected(trackers: Sequence[DemoTracker], limited: LimitedRuns) -> bool:
    exact = all(row.precision_ratio == row.recall_ratio == 1.0 for row in trackers)
    kept = limited.managed
    whole = kept.status == kept.oom_kills == kept.daemon_status == 0
    killed = limited.alone is None or limited.alone.oom_kills > 0
    return exact and whole and killed


def _show(settings: DemoSettings, report: DemoOutput) -> None:
    limited, kept, free = report.limited, report.limited.managed, report.throughput
    rows: list[tuple[str, str]] = [("engine", settings.engine)]
    if limited.alone is not None:
        killed = "killed by the kernel" if limited.alone.oom_kills else "not killed (!)"
        rows.append((f"limit, cgroup {limited.cgroup}", f"{limited.limit_bytes / _MIB:.0f} MiB"))
        rows.append(("without the daemon", killed))
    else:
        rows.append(("limit", f"no cgroup: the daemon's budget ({limited.why})"))
    ended = "ran to its end, every check passed" if kept.status == 0 else "FAILED"
    rows += [
        ("with the daemon", f"{ended} (status {kept.status})"),
        ("pages evicted", f"{kept.evictions:,} ({kept.direct_evictions:,} at the limit)"),
        ("pages faulted in", f"{kept.fault_ins:,}"),
        ("refault ratio", f"{kept.refault_ratio:.2f}"),
        (
            "resident, without and with",
            f"{kept.touched_bytes / _MIB:.0f} MiB, "
            f"{kept.peak_resident_bytes / _MIB:.0f} MiB at most",
        ),
        ("compression ratio", f"{kept.compression_ratio:.1f}"),
        (
            "epochs/s, no limit",
            f"{free.alone_epochs_per_s:.0f} without the daemon, "
            f"{free.managed_epochs_per_s:.0f} with a harvest a second",
        ),
    ]
    for row in report.trackers:
        rows.append(
            (
                f"tracker {row.tracker}",
                f"precision {row.precision_ratio:.4f}, recall {row.recall_ratio:.4f}, "
                f"harvest {row.harvest_ns_per_page:.1f} ns a page",
            )
        )
    show_table("kvmhost demo", rows)
    print("all as it should be" if report.ok else "NOT as it should be: see the table")
    print(f"heatmap: {report.heatmap or 'not drawn; ' + install_hint('plot')}")
