"""``kvmhost bench trackers``: harvests compared with the bare kernel calls, and memory.

A harvest of ``pagemap`` is compared with one PAGEMAP_SCAN of the same range, and a harvest
of ``dirty`` with KVM_GET_DIRTY_LOG (and KVM_CLEAR_DIRTY_LOG), in turn in one run. The bare
calls get preallocated buffers that are large enough, and their results are not processed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import statistics
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvmhost._ffi import check, ffi, lib
from kvmhost.bitmap import n_words
from kvmhost.errors import KvmHostError
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.memory.guest import Region
from kvmhost.memory.layout import TinyLayout
from kvmhost.tools.args import about
from kvmhost.tools.bench.bounds import BOUNDS
from kvmhost.tools.measured import bench_head
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.bench import (
    SpeedRow,
    TrackerMemoryRow,
    TrackersOutput,
    TrackersParameters,
)
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import working
from kvmhost.tools.vocabulary import add_option
from kvmhost.trackers import NAMES, Tracker, probe_all
from kvmhost.trackers.pagescan import scans
from kvmhost.units import PAGE_BYTES

__all__ = ["main", "parser", "run"]

_GFN_START = 1024
_MEMORY_SHARE = BOUNDS["trackers.max_share"].limit

#: Guest parameters by case. A pagemap harvest that clears also zaps, which is not a scan.
_PAGEMAP: dict[str, dict[str, int]] = {
    "all pages": {"stride": 1},
    "every 4th page": {"stride": 4},
    "every 64th page": {"stride": 64},
    "none": {},
}
#: Guest parameters by case, and whether the harvest clears.
_DIRTY = {
    "look": ({"stride": 10, "write": 1}, False),
    "clear, every 10th page": ({"stride": 10, "write": 1}, True),
    "clear, a run of a tenth": ({"part": 10, "write": 1}, True),
    "clear, all pages": ({"stride": 1, "write": 1}, True),
}


def run(mem_bytes: int = 1 << 30, rounds: int = 15) -> TrackersOutput:
    """Measure the trackers that work on this host, with KVM if it works, else emulated."""
    support = probe_all("auto")
    speed = []
    for case, params in _PAGEMAP.items():
        with _machine(mem_bytes, params) as machine:
            speed.append(_speed_row("pagemap", case, _pagemap(machine, params, rounds)))
    if support["dirty"].works:
        for case, (params, clear) in _DIRTY.items():
            with _machine(mem_bytes, params) as machine:
                speed.append(_speed_row("dirty", case, _dirty(machine, clear, rounds)))
    memory = [_memory(name, mem_bytes) for name in NAMES if support[name].works]
    parameters = TrackersParameters(mem_bytes=mem_bytes, rounds=rounds)
    return TrackersOutput(
        **bench_head("trackers"), parameters=parameters, speed=speed, memory=memory
    )


def _speed_row(tracker: str, case: str, median_us: dict[str, float]) -> SpeedRow:
    bare_us, harvest_us = median_us["bare"], median_us["harvest"]
    return SpeedRow(
        tracker=tracker,
        case=case,
        bare_us=bare_us,
        harvest_us=harvest_us,
        harvest_of_bare_ratio=harvest_us / bare_us,
    )


def _machine(mem_bytes: int, params: dict[str, int]) -> Machine:
    given = dict(params)
    # The page tables that map guest memory are at its end.
    pages = TinyLayout(mem_bytes).tables_gpa // PAGE_BYTES - _GFN_START
    given["pages"] = pages // given.pop("part", 1)
    given |= {"gfn_start": _GFN_START, "epochs": 0}
    machine = Machine(image_path("touch"), mem_bytes=mem_bytes, params=given)
    machine.step_by_doorbell()
    return machine


def _in_turn(
    prepare: Callable[[], object], variants: dict[str, Callable[[], object]], rounds: int
) -> dict[str, float]:
    """Time variants in turn, in rotating order; return median µs of each."""
    times: dict[str, list[int]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        for name in names if turn % 2 else reversed(names):
            prepare()
            start = lib.kh_bench_now_ns()
            variants[name]()
            times[name].append(lib.kh_bench_now_ns() - start)
    return {name: statistics.median(values) / 1000 for name, values in times.items()}


def _pagemap(machine: Machine, params: dict[str, int], rounds: int) -> dict[str, float]:
    tracker = machine.use_tracker("pagemap")
    if params:
        machine.run_epoch()
    region = machine.memory.regions[0]
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not scans(fd):
            raise KvmHostError("bench trackers: this kernel has no PAGEMAP_SCAN to compare with")
        bare = _bare_scan(fd, region)
        harvest = tracker.harvest
        variants: dict[str, Callable[[], object]] = {
            "bare": bare,
            "harvest": lambda: harvest(region.gfn, region.n_pages, clear=False),
        }
        return _in_turn(lambda: None, variants, max(rounds, 31))
    finally:
        os.close(fd)


def _bare_scan(fd: int, region: Region) -> Callable[[], object]:
    regions = ffi.new("struct page_region[]", region.n_pages // 2 + 1)
    request = ffi.new("struct pm_scan_arg *")
    request.size = ffi.sizeof("struct pm_scan_arg")
    request.start, request.end = region.guest_address, region.guest_address + region.n_bytes
    request.vec, request.vec_len = int(ffi.cast("uintptr_t", regions)), len(regions)
    request.category_mask = request.return_mask = lib.PAGE_IS_PRESENT

    def scan(keep: Any = regions) -> None:
        # SAFETY: the argument keeps the buffer that the request points to.
        check(lib.kh_ioctl_ptr(fd, lib.PAGEMAP_SCAN, request), "PAGEMAP_SCAN")

    return scan


def _dirty(machine: Machine, clear: bool, rounds: int) -> dict[str, float]:
    tracker = machine.use_tracker("dirty")
    # One slot at a time, as in the tracker.
    bare = [_bare_log(machine, slot, region, clear) for slot, region in _slots(machine)]
    machine.run_epoch()
    gfn_end = machine.memory.gfn_end
    variants: dict[str, Callable[[], object]] = {
        "bare": lambda: [one() for one in bare],
        "harvest": lambda: tracker.harvest(0, gfn_end, clear),
    }
    # If pages are cleared, the guest writes them again before each call.
    prepare: Callable[[], object] = machine.run_epoch if clear else lambda: None
    return _in_turn(prepare, variants, rounds if clear else max(rounds, 101))


def _slots(machine: Machine) -> list[tuple[int, Region]]:
    return list(enumerate(machine.memory.regions))


def _bare_log(machine: Machine, slot: int, region: Region, clear: bool) -> Callable[[], object]:
    from kvmhost.engine.kvm import KvmEngine

    assert isinstance(machine.engine, KvmEngine)
    fd = machine.engine.vm.fd
    words = np.zeros(n_words(region.n_pages), dtype=np.uint64)
    view = ffi.from_buffer("uint64_t[]", words)
    get = ffi.new("struct kvm_dirty_log *", {"slot": slot, "dirty_bitmap": view})
    fields = {"slot": slot, "num_pages": region.n_pages, "dirty_bitmap": view}
    put = ffi.new("struct kvm_clear_dirty_log *", fields)

    def once(keep: Any = words) -> None:
        # SAFETY: the argument keeps the bitmap that both requests point to.
        check(lib.kh_ioctl_ptr(fd, lib.KVM_GET_DIRTY_LOG, get), "KVM_GET_DIRTY_LOG")
        if clear:
            check(lib.kh_ioctl_ptr(fd, lib.KVM_CLEAR_DIRTY_LOG, put), "KVM_CLEAR_DIRTY_LOG")

    return once


# -- memory -------------------------------------------------------------------


def _memory(name: str, mem_bytes: int) -> TrackerMemoryRow:
    """Return the memory of a tracker after three harvests, and its peak during them."""
    with _machine(16 << 20, {"stride": 1, "write": 1}) as machine:
        _use(machine, machine.use_tracker(name))  # imports, caches, calibration
    with _machine(mem_bytes, {"stride": 8, "write": 1}) as machine:
        machine.run_epoch()
        gc.collect()
        # Return freed memory to the kernel first, or new buffers would reuse it uncounted.
        ctypes.CDLL(None).malloc_trim(0)
        tracemalloc.start()
        before = _anonymous_bytes()
        tracker = machine.use_tracker(name)
        _use(machine, tracker)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        gc.collect()
        held = max(0, _anonymous_bytes() - before)
    most = max(held, peak)
    return TrackerMemoryRow(
        tracker=name, held_bytes=held, max_bytes=most, max_share=most / mem_bytes
    )


def _use(machine: Machine, tracker: Tracker) -> None:
    gfn_end = machine.memory.gfn_end
    for _ in range(3):
        machine.run_epoch()
        tracker.rearm(0, gfn_end, tracker.harvest(0, gfn_end))


def _anonymous_bytes() -> int:
    """Return the anonymous memory of this process in bytes, which excludes guest memory."""
    found = re.search(r"^Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(prog="kvmhost bench trackers", description=about(__doc__))
    add_option(parser, "--mem", default="1G")
    add_option(parser, "--rounds", default=15, help="measurements of each variant")
    add_option(parser, "--json")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the figures as tables, or as JSON."""
    options = parser().parse_args(argv)
    with working("bench trackers"):
        result = run(options.mem, options.rounds)
    if options.json:
        emit(result)
        return 0
    given = result.parameters
    print(f"guest of {given.mem_bytes >> 20} MiB, {given.rounds} rounds, medians")
    for row in result.speed:
        print(
            f"{row.tracker:8} {row.case:24} bare {row.bare_us:9.1f} us, "
            f"harvest {row.harvest_us:9.1f} us, {row.harvest_of_bare_ratio:.2f} times"
        )
    for one in result.memory:
        print(
            f"{one.tracker:8} holds {one.held_bytes / 1024:.0f} KiB, takes at most "
            f"{one.max_bytes / 1024:.0f} KiB: {one.max_share * 100:.3f} % of guest memory "
            f"(bound {_MEMORY_SHARE} %)"
        )
    return 0
