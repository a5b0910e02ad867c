"""``kvmhost demo``: the whole path in one command, on real input.

1. how right each tracker is, against the gfns computed from the guest's seed;
2. what aging costs a guest: epochs a second with and without the daemon, no limit;
3. a guest in a memory cgroup of half of what it touches, without the daemon: the
   kernel kills it;
4. the same guest and limit with the daemon: it runs to its end, every byte checked;
5. a picture: which page was touched when.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kvmhost.control.client import Client
from kvmhost.errors import CapabilityError, GuestError, KvmHostError, LayoutError
from kvmhost.files import check_target
from kvmhost.guests import image_path
from kvmhost.guests.workloads import hotcold_gfns
from kvmhost.installing import install_hint
from kvmhost.machine import Machine
from kvmhost.pager.userfault import Userfault
from kvmhost.reclaim.pressure.cgroup import MemoryCgroup
from kvmhost.tools.args import about, size_bytes
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import Progress, show_table
from kvmhost.trackers import NAMES, describe, probe_all

__all__ = ["main", "parser"]

_MIB = 1 << 20
_START_GFN = 1024
#: Beside guest memory and the store: interpreter, page tables, KVM's or the emulator's memory.
_PROCESS_BYTES = {"kvm": 46 * _MIB, "emulated": 70 * _MIB}
#: An emulated guest is about ten times slower: less to do in the same time.
_EMULATED_SHARE = 10
#: What a page of this guest takes in the store, compressed, about a tenth.
_STORE_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """The guest of the demo, in pages and epochs."""

    mem_bytes: int
    hot_bytes: int
    epochs: int
    engine: str
    seed: int = 1

    @property
    def pages(self) -> int:
        """Pages that the guest owns: nearly all of its memory."""
        return (self.mem_bytes * 15 // 16) // 4096 - _START_GFN

    @property
    def touched_bytes(self) -> int:
        """What the guest touches over its run."""
        return self.pages * 4096

    @property
    def limit_bytes(self) -> int:
        """Half of what it touches."""
        return self.touched_bytes // 2

    @property
    def budget_bytes(self) -> int:
        """Resident guest memory that leaves room under the limit for store and process."""
        room = self.limit_bytes - _PROCESS_BYTES[self.engine] - self.touched_bytes * _STORE_SHARE
        return int(room / (1 - _STORE_SHARE)) // 4096 * 4096

    def params(self, epochs: int | None = None) -> dict[str, int]:
        """Parameters of the guest."""
        return {
            "start_gfn": _START_GFN,
            "pages": self.pages,
            "hot": self.hot_bytes // 4096,
            "cold": 16,
            "scan_every": 200 if self.engine == "kvm" else 40,
            "scan_epochs": 64 if self.engine == "kvm" else 16,
            "epochs": self.epochs if epochs is None else epochs,
            "seed": self.seed,
        }


def main(argv: Sequence[str]) -> int:
    """Run the demo; 0 if every part did what it should."""
    args = parser().parse_args(argv)
    engine = _engine_name(args.engine)
    check_target(args.output)
    # Both halves need it: better told now than by a child after a while.
    Userfault().close()
    share = 1 if engine == "kvm" else _EMULATED_SHARE
    settings = DemoSettings(args.mem, args.hot // min(share, 4), args.epochs // share, engine)
    if settings.budget_bytes < settings.hot_bytes:
        raise LayoutError(
            f"--mem {args.mem >> 20} MiB leaves a budget of {settings.budget_bytes >> 20} MiB "
            f"for a hot set of {settings.hot_bytes >> 20} MiB: give more memory or a smaller --hot"
        )
    with tempfile.TemporaryDirectory(prefix="kvmhost-demo-") as runtime:
        os.environ["KVMHOST_RUNTIME_DIR"] = runtime
        report = _run(settings, args.output, Progress(args.json))
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _show(settings, report)
    return 0 if report["ok"] else 1


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost demo",
        description=about(__doc__),
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--engine", default="auto", choices=("auto", "kvm", "emulated"))
    parser.add_argument("--mem", type=size_bytes, default=320 * _MIB, metavar="SIZE")
    parser.add_argument("--hot", type=size_bytes, default=48 * _MIB, metavar="SIZE")
    parser.add_argument("--epochs", type=int, default=300, help="epochs of the limited runs")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("kvmhost-demo.png"), help="the heatmap"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _engine_name(wanted: str) -> str:
    with Machine(image_path("hello"), mem_bytes=4 * _MIB, engine=wanted) as machine:
        return machine.engine.name


def _run(settings: DemoSettings, picture: Path, progress: Progress) -> dict[str, typing.Any]:
    progress.say(f"engine {settings.engine}: guest of {settings.mem_bytes // _MIB} MiB")
    report: dict[str, typing.Any] = {"engine": settings.engine, "mem_bytes": settings.mem_bytes}
    epochs = 13
    progress.say(f"accuracy of the trackers, {epochs} epochs each")
    report["trackers"] = [_accuracy(settings, name, epochs) for name in _working_trackers(settings)]
    progress.say("guest throughput without and with the daemon, no limit; drawing the picture")
    report["throughput"] = _throughput(settings)
    report["heatmap"] = _picture(settings, picture)
    report["limited"] = _limited(settings, progress)
    report["ok"] = _all_well(report)
    return report


def _working_trackers(settings: DemoSettings) -> list[str]:
    """Return the trackers that work here and see every touch, not only writes."""
    support = probe_all(settings.engine)
    return [n for n in NAMES if support[n].works and "reads" in describe(n).sees]


# -- accuracy ------------------------------------------------------------------


def _accuracy(settings: DemoSettings, name: str, epochs: int) -> dict[str, typing.Any]:
    """Precision and recall of one harvest an epoch, over a smaller guest with a scan in it."""
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
            young = tracker.harvest(_START_GFN, settings.pages)
            cost.append((time.perf_counter_ns() - start) / settings.pages)
            tracker.rearm(_START_GFN, settings.pages, young)
            expected = hotcold_gfns(machine.params, epoch)
            right += int(np.isin(young.gfns(), expected).sum())
            reported += young.count()
            touched += expected.size
    return {
        "tracker": name,
        "precision": right / reported if reported else 0.0,
        "recall": right / touched,
        "harvest_ns_per_page": statistics.median(cost),
    }


# -- throughput ------------------------------------------------------------------


def _throughput(settings: DemoSettings, seconds: float = 2.0) -> dict[str, float]:
    """Epochs a second of one VM, in turn without and with the daemon, no limit set."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    # No scans: a window with one would be compared with a window without.
    with _vm(settings, "free", epochs=0, scan_every=0) as vm:
        _wait(lambda: vm.client.state().doorbells > 2, vm, "the first epochs")
        for with_daemon in (False, True, False, True):
            with contextlib.ExitStack() as stack:
                if with_daemon:
                    budget = settings.mem_bytes
                    stack.enter_context(_daemon("free", budget, 1.0, _logs(vm.directory)))
                    passes = vm.client.counters().harvest.harvests
                    _wait(_more_harvests(vm, passes), vm, "a pass")
                start, first = time.perf_counter(), vm.client.state().doorbells
                time.sleep(seconds)
                done = vm.client.state().doorbells - first
                rates[with_daemon].append(done / (time.perf_counter() - start))
    return {
        "epochs_per_s_without": statistics.median(rates[False]),
        "epochs_per_s_with": statistics.median(rates[True]),
    }


def _picture(settings: DemoSettings, path: Path) -> str | None:
    """Harvest a VM live and draw gfn by time; None without the plot extra."""
    from kvmhost.reclaim.draw.heatmap import live_heatmap
    from kvmhost.reclaim.draw.render import need_plotting, render_heatmap

    try:
        need_plotting()
    except CapabilityError:
        return None
    with _vm(settings, "picture", epochs=0) as vm:
        _wait(lambda: vm.client.state().doorbells > 2, vm, "the first epochs")
        heatmap = live_heatmap(vm.client, interval_s=0.08, count=70)
        render_heatmap(heatmap, path)
    return str(path)


# -- under a limit -----------------------------------------------------------------


def _limited(settings: DemoSettings, progress: Progress) -> dict[str, typing.Any]:
    try:
        group = MemoryCgroup.create("demo", limit_bytes=settings.limit_bytes)
    except (CapabilityError, KvmHostError) as error:
        progress.say(f"no memory cgroup here ({error}): the daemon's budget is the limit")
        return {"cgroup": None, "why": str(error), "with": _with_daemon(settings, None)}
    with group:
        limit = settings.limit_bytes // _MIB
        progress.say(f"cgroup v{group.version} with a limit of {limit} MiB, without the daemon")
        without = _without_daemon(settings, group)
        progress.say(f"the same with the daemon, budget {settings.budget_bytes // _MIB} MiB")
        return {
            "cgroup": f"v{group.version}",
            "limit_bytes": settings.limit_bytes,
            "budget_bytes": settings.budget_bytes,
            "without": without,
            "with": _with_daemon(settings, group),
        }


def _without_daemon(settings: DemoSettings, group: MemoryCgroup) -> dict[str, typing.Any]:
    before = group.oom_kills()
    with _vm(settings, "doomed", epochs=settings.epochs, group=group) as vm:
        vm.client.resume()
        status = vm.process.wait(timeout=120)
    return {"status": status, "oom_kills": group.oom_kills() - before}


def _with_daemon(settings: DemoSettings, group: MemoryCgroup | None) -> dict[str, typing.Any]:
    before = group.oom_kills() if group else 0
    peak = 0
    with (
        _vm(settings, "kept", epochs=settings.epochs, group=group) as vm,
        _daemon("kept", settings.budget_bytes, 0.25, _logs(vm.directory)) as daemon,
    ):
        _wait(lambda: vm.client.state().limit_bytes > 0, vm, "the daemon's limit")
        start = time.monotonic()
        vm.client.resume()
        while vm.process.poll() is None and time.monotonic() - start < 240:
            with contextlib.suppress(KvmHostError):
                peak = max(peak, vm.client.state().resident_bytes)
            time.sleep(0.2)
        seconds = time.monotonic() - start
        report = vm.report()
        # It ends by itself, with 0, when its only VM is gone.
        daemon_status = daemon.wait(timeout=30)
    pager = report["pager"] or {}
    stored = pager.get("evicted_pages", 0) - pager.get("same_filled_pages", 0)
    return {
        "status": report["status"],
        "seconds": seconds,
        "epochs_per_s": report["doorbells"] / seconds,
        "oom_kills": (group.oom_kills() if group else 0) - before,
        "evictions": pager.get("evictions", 0),
        "direct_evictions": pager.get("direct_evictions", 0),
        "fault_ins": pager.get("fault_ins", 0),
        "refault_ratio": pager.get("fault_ins", 0) / max(1, pager.get("evictions", 0)),
        "resident_without_bytes": settings.touched_bytes,
        "resident_peak_bytes": peak,
        "resident_end_bytes": report["resident_bytes"],
        "compression_ratio": stored * 4096 / max(1, pager.get("store_bytes", 0)),
        "same_filled_pages": pager.get("same_filled_pages", 0),
        "daemon_status": daemon_status,
    }


# -- processes ---------------------------------------------------------------------


@dataclasses.dataclass
class _Vm:
    """A VM process of the demo and a client of it."""

    process: subprocess.Popen[bytes]
    client: Client
    directory: Path

    def report(self) -> dict[str, typing.Any]:
        """Return what ``run --json`` printed; the VM has ended."""
        self.process.wait(timeout=30)
        text = (self.directory / "report.json").read_text()
        if not text.strip():
            errors = (self.directory / "vm.log").read_text()
            raise GuestError(f"the VM ended with {self.process.returncode}: {errors[-500:]}")
        report: dict[str, typing.Any] = json.loads(text)
        return report


@contextlib.contextmanager
def _vm(
    settings: DemoSettings,
    name: str,
    *,
    epochs: int,
    group: MemoryCgroup | None = None,
    **params: int,
) -> Iterator[_Vm]:
    """Start a VM process, paused if it goes into a cgroup or is to end by itself."""
    words = [sys.executable, "-m", "kvmhost", "run", "hotcold", "--name", name, "--json"]
    words += ["--engine", settings.engine, "--mem", str(settings.mem_bytes)]
    if epochs:
        words.append("--paused")
    for key, value in (settings.params(epochs) | params).items():
        words += ["--param", f"{key}={value}"]
    with (
        tempfile.TemporaryDirectory(prefix="kvmhost-demo-") as folder,
        contextlib.ExitStack() as stack,
    ):
        directory = Path(folder)
        report = stack.enter_context((directory / "report.json").open("wb"))
        log = stack.enter_context((directory / "vm.log").open("wb"))
        # The child waits for a line, so that it is in its cgroup before it allocates.
        gate = ["sh", "-c", 'read -r _ && exec "$@"', "sh", *words]
        process = subprocess.Popen(gate, stdin=subprocess.PIPE, stdout=report, stderr=log)
        stack.callback(_end, process)
        if group is not None:
            group.add_pid(process.pid)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
        vm = _Vm(process, stack.enter_context(_connect(name, process)), directory)
        yield vm


@contextlib.contextmanager
def _connect(name: str, process: subprocess.Popen[bytes]) -> Iterator[Client]:
    deadline = time.monotonic() + 30
    while True:
        try:
            client = Client(name)
            client.state()
            break
        except KvmHostError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    with client:
        yield client


@contextlib.contextmanager
def _daemon(
    name: str, budget_bytes: int, interval_s: float, log: typing.BinaryIO
) -> Iterator[subprocess.Popen[bytes]]:
    words = [sys.executable, "-m", "kvmhost", "reclaimd", name]
    words += ["--budget", str(budget_bytes), "--interval", str(interval_s)]
    with log, contextlib.ExitStack() as stack:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        stack.callback(_end, process)
        yield process


def _logs(directory: Path) -> typing.BinaryIO:
    return (directory / "reclaimd.log").open("ab")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that this demo started, gently first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _more_harvests(vm: _Vm, than: int) -> Callable[[], bool]:
    return lambda: vm.client.counters().harvest.harvests > than


def _wait(condition: Callable[[], bool], vm: _Vm, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if vm.process.poll() is not None:
            raise GuestError(f"the VM ended with {vm.process.returncode} before {what}")
        if time.monotonic() > deadline:
            raise GuestError(f"not within 60 s: {what}")
        time.sleep(0.05)


# -- the table -----------------------------------------------------------------------


def _all_well(report: dict[str, typing.Any]) -> bool:
    limited = report["limited"]
    exact = all(row["precision"] == row["recall"] == 1.0 for row in report["trackers"])
    kept = not any(limited["with"][key] for key in ("status", "oom_kills", "daemon_status"))
    killed = limited["cgroup"] is None or limited["without"]["oom_kills"] > 0
    return exact and kept and killed


def _show(settings: DemoSettings, report: dict[str, typing.Any]) -> None:
    limited, kept = report["limited"], report["limited"]["with"]
    free = report["throughput"]
    rows = [("engine", settings.engine)]
    if limited["cgroup"]:
        killed = "killed by the kernel" if limited["without"]["oom_kills"] else "not killed (!)"
        rows.append(
            (f"limit, cgroup {limited['cgroup']}", f"{limited['limit_bytes'] / _MIB:.0f} MiB")
        )
        rows.append(("without the daemon", killed))
    else:
        rows.append(("limit", f"no cgroup: the daemon's budget ({limited['why']})"))
    ended = "ran to its end, every check passed" if kept["status"] == 0 else "FAILED"
    rows += [
        ("with the daemon", f"{ended} (status {kept['status']})"),
        ("pages evicted", f"{kept['evictions']:,} ({kept['direct_evictions']:,} at the limit)"),
        ("pages faulted in", f"{kept['fault_ins']:,}"),
        ("refault ratio", f"{kept['refault_ratio']:.2f}"),
        (
            "resident, without and with",
            f"{kept['resident_without_bytes'] / _MIB:.0f} MiB, "
            f"{kept['resident_peak_bytes'] / _MIB:.0f} MiB at most",
        ),
        ("compression ratio", f"{kept['compression_ratio']:.1f}"),
        (
            "epochs/s, no limit",
            f"{free['epochs_per_s_without']:.0f} without the daemon, "
            f"{free['epochs_per_s_with']:.0f} with a harvest a second",
        ),
    ]
    for row in report["trackers"]:
        rows.append(
            (
                f"tracker {row['tracker']}",
                f"precision {row['precision']:.4f}, recall {row['recall']:.4f}, "
                f"harvest {row['harvest_ns_per_page']:.1f} ns a page",
            )
        )
    show_table("kvmhost demo", rows)
    print("all as it should be" if report["ok"] else "NOT as it should be: see the table")
    print(f"heatmap: {report['heatmap'] or 'not drawn; ' + install_hint('plot')}")
