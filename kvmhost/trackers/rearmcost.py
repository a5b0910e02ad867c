"""Measures what the touch of a re-armed page costs a guest, with a tracker and an engine.

The guest of :mod:`kvmhost.trackers.probeguest` writes its pages twice, before and after the
tracker cleared and re-armed them; the difference per page is the cost. Where the fault is served
in the thread of the vCPU, processor time counts, since it does not depend on what else the host
does. Where another thread answers it, the vCPU sleeps, and the time that passes counts.

The figure depends on the load of the host, because memory and caches are shared: it is measured
again when it is older than :data:`MAX_AGE_S`.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import threading
import time
import typing

from kvmhost.pager.userfault import Userfault
from kvmhost.trackers import registry
from kvmhost.trackers.base import TrackedVm, Tracker
from kvmhost.trackers.probeguest import GFN_START, ProbeGuest, probe_guest
from kvmhost.vm.answers import RearmCost
from kvmhost.vm.names import EngineName

__all__ = ["MAX_AGE_S", "rearm_cost"]

#: A measurement serves for this long.
MAX_AGE_S = 60.0
_PAGES = 256
_TRIES = 7


class _Time(typing.NamedTuple):
    """One run of the guest over its pages."""

    wall_ns: int
    cpu_ns: int
    sleeps: int


class _Measured(typing.NamedTuple):
    fault_ns: float
    waits: bool
    at_s: float


_lock = threading.Lock()
_measured: dict[tuple[str, EngineName], _Measured] = {}


def rearm_cost(tracker: str, engine: EngineName) -> RearmCost:
    """Return the cost of a re-armed page; measure it if the last figure is too old. Any thread.

    :param tracker: one of :data:`~kvmhost.trackers.registry.NAMES`
    :raises CapabilityError: if tracker or engine do not work here
    """
    with _lock:
        found = _measured.get((tracker, engine))
        if found is None or time.monotonic() - found.at_s > MAX_AGE_S:
            found = _measured[tracker, engine] = _measure(tracker, engine)
        age_s = time.monotonic() - found.at_s
        return RearmCost(tracker, found.fault_ns, found.waits, _PAGES, _TRIES, age_s)


def _measure(name: str, engine: EngineName) -> _Measured:
    with probe_guest(engine, _PAGES, writes=True) as guest, contextlib.ExitStack() as stack:
        opened: list[Userfault] = []

        def open_userfault() -> Userfault:
            if not opened:
                opened.append(Userfault())
                stack.callback(opened[0].close)
            return opened[0]

        vm = TrackedVm(guest.memory, guest.engine, guest.tables_gpa, open_userfault)
        guest.touch_all()
        tracker = registry.create(name, vm)
        stack.callback(tracker.stop)
        tracker.start()
        guest.touch_all()
        return _median([_try(guest, tracker) for _ in range(_TRIES)])


def _try(guest: ProbeGuest, tracker: Tracker) -> tuple[_Time, _Time]:
    """Return the time of a run without faults, and of one over re-armed pages."""
    warm = _timed(guest)
    tracker.rearm(GFN_START, _PAGES, tracker.harvest(GFN_START, _PAGES))
    return warm, _timed(guest)


def _timed(guest: ProbeGuest) -> _Time:
    sleeps = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    wall_ns, cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
    guest.touch_all()
    cpu_ns, wall_ns = time.thread_time_ns() - cpu_ns, time.perf_counter_ns() - wall_ns
    return _Time(wall_ns, cpu_ns, resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - sleeps)


def _median(tries: list[tuple[_Time, _Time]]) -> _Measured:
    waits = statistics.median(rearmed.sleeps for _, rearmed in tries) > _PAGES / 2
    costs = [
        rearmed.wall_ns - warm.wall_ns if waits else rearmed.cpu_ns - warm.cpu_ns
        for warm, rearmed in tries
    ]
    # Where hardware walks the tables it is a TLB miss, less than the noise.
    return _Measured(max(0.0, statistics.median(costs) / _PAGES), waits, time.monotonic())
