"""``kvmhost bench harvest``: trackers on a 1 GiB guest, and what the guest pays.

The guest reads a hot set over and over. Measured for each tracker: a scan of
all pages, a re-arm of the hot ones, the guest's throughput at one harvest a
second against none, in turn. A re-armed page costs the guest one fault on its
next touch, which nothing can save; so the time lost is compared with (hot
pages x the bare cost of such a fault), measured in the same run by zapping the
hot set between two epochs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

from guests import image_path
from kvmhost.machine import Machine
from kvmhost.memory.layout import PAGE_BYTES
from kvmhost.trackers import NAMES, Tracker, describe, probe_all

__all__ = ["main", "run"]

_START_GFN = 1024


def run(
    mem_bytes: int = 1 << 30, hot_share: float = 0.1, seconds: float = 4.0, repeats: int = 3
) -> dict[str, Any]:
    """Measure every tracker that works here; ``trackers`` holds one row each.

    :raises CapabilityError: without /dev/kvm
    """
    n_pages = mem_bytes // PAGE_BYTES
    hot = int(n_pages * hot_share)
    support = probe_all("kvm")
    rows = [
        _measure(name, mem_bytes, hot, seconds, repeats) for name in NAMES if support[name].works
    ]
    return {"mem_bytes": mem_bytes, "hot_pages": hot, "seconds": seconds, "trackers": rows}


def _measure(name: str, mem_bytes: int, hot: int, seconds: float, repeats: int) -> dict[str, Any]:
    # A tracker that sees only writes is measured on a guest that writes.
    writes = int("reads" not in describe(name).sees)
    params = {"start_gfn": _START_GFN, "pages": hot, "epochs": 0, "write": writes}
    image = image_path("touch")
    with Machine(image, mem_bytes=mem_bytes, engine="kvm", params=params) as machine:
        machine.step_by_doorbell()
        machine.run_epoch()
        tracker = machine.use_tracker(name)
        stepped = _stepped(machine, tracker, hot, repeats)
        machine.step_by_doorbell(False)
        _rate(machine, tracker, 0.5, harvests=False)
        bare, harvested = [], []
        for _ in range(repeats):
            bare.append(_rate(machine, tracker, seconds, harvests=False))
            harvested.append(_rate(machine, tracker, seconds, harvests=True))
    free, with_harvest = statistics.median(bare), statistics.median(harvested)
    lost = 1 - with_harvest / free
    bound = hot * stepped["refault_ns"] / 1e9
    return {
        "tracker": name,
        "scan_ns_per_page": stepped["scan_ns"] / (mem_bytes // PAGE_BYTES),
        "rearm_ns_per_hot_page": stepped["rearm_ns"] / hot,
        "refault_ns_per_page": stepped["refault_ns"],
        "epochs_per_s_free": free,
        "epochs_per_s_harvested": with_harvest,
        "lost_s_per_s": lost,
        "bare_refault_s": bound,
        "lost_of_bare_refault": lost / bound,
    }


def _stepped(machine: Machine, tracker: Tracker, hot: int, repeats: int) -> dict[str, float]:
    """Time a scan, a re-arm and a warm and a re-faulting epoch while nothing else runs."""
    gfn_end = machine.memory.gfn_end
    times: dict[str, list[float]] = {"scan": [], "rearm": [], "warm": [], "cold": []}
    for _ in range(max(repeats, 5)):
        machine.run_epoch()
        times["warm"].append(_timed_epoch(machine))
        start = time.perf_counter_ns()
        young = tracker.harvest(0, gfn_end, clear=False)
        scanned = time.perf_counter_ns()
        # Clearing and re-arming are one act for pagemap and two for guestpt.
        tracker.rearm(0, gfn_end, tracker.harvest(_START_GFN, hot))
        done = time.perf_counter_ns()
        times["scan"].append(scanned - start)
        times["rearm"].append(done - scanned)
        times["cold"].append(_timed_epoch(machine))
        if young.count() < hot:
            raise RuntimeError(f"{young.count()} pages young, {hot} were touched")
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "scan_ns": median["scan"],
        "rearm_ns": median["rearm"],
        "refault_ns": (median["cold"] - median["warm"]) / hot,
    }


def _timed_epoch(machine: Machine) -> int:
    start = time.perf_counter_ns()
    machine.run_epoch()
    return time.perf_counter_ns() - start


def _rate(machine: Machine, tracker: Tracker, seconds: float, harvests: bool) -> float:
    """Let the guest run free, with one harvest and re-arm a second or none; epochs a second."""
    stop = threading.Event()
    gfn_end = machine.memory.gfn_end
    first, start = machine.doorbells, time.perf_counter()
    while (left := start + seconds - time.perf_counter()) > 0:
        if harvests:
            tracker.rearm(0, gfn_end, tracker.harvest(0, gfn_end))
        # The harvest comes at the start of its second.
        stop.wait(min(left, 1 - (time.perf_counter() - start) % 1))
    return (machine.doorbells - first) / (time.perf_counter() - start)


def main(argv: Sequence[str]) -> int:
    """Print the figures as a table, or as JSON."""
    parser = argparse.ArgumentParser(prog="kvmhost bench harvest", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each segment")
    parser.add_argument("--repeats", type=int, default=3, help="segments of each kind")
    parser.add_argument("--hot", type=float, default=0.1, help="share of memory that is hot")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    result = run(hot_share=options.hot, seconds=options.seconds, repeats=options.repeats)
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"guest of {result['mem_bytes'] >> 20} MiB, {result['hot_pages']} hot pages")
    for row in result["trackers"]:
        print(
            f"{row['tracker']:8} scan {row['scan_ns_per_page']:5.2f} ns a page, "
            f"clear and re-arm {row['rearm_ns_per_hot_page']:5.0f} ns a hot page, "
            f"bare re-fault {row['refault_ns_per_page']:5.0f} ns\n"
            f"         {row['epochs_per_s_free']:.1f} epochs a second free, "
            f"{row['epochs_per_s_harvested']:.1f} with one harvest a second: "
            f"{row['lost_s_per_s'] * 1000:.0f} ms lost a second, "
            f"{row['lost_of_bare_refault']:.2f} times the bare re-faults"
        )
    return 0
