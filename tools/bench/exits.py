"""``kvmhost bench exits``: the cost of a port exit, relative to a minimal C loop.

Five methods of handling the same guest's port writes take turns in one run: a
hand-written minimal C loop, the C run loop (which counts the write as a
doorbell), a device in Python, an eventfd that KVM signals (ioeventfd), and the
ring in which KVM collects writes (coalesced). The last two avoid the exit.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence

from kvmhost._ffi import check, lib
from kvmhost.devices.bus import DOORBELL_PORT, EXIT_PORT
from kvmhost.engine.kvm import KvmEngine
from kvmhost.exits import IoOut
from kvmhost.guests import image_path
from kvmhost.kvm.coalesced import CoalescedRing
from kvmhost.machine import Machine
from kvmhost.tools.args import about, count
from kvmhost.tools.bench.bounds import BOUNDS
from kvmhost.tools.measured import bench_head
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.bench import ExitsOutput, ExitsParameters, MethodName, MethodRow
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import working
from kvmhost.tools.vocabulary import add_option

__all__ = ["main", "parser", "run"]

_PYTHON_PORT = 0x600
_MINIMAL: MethodName = "minimal C loop"


class _Counter:
    """A device that counts writes."""

    def __init__(self) -> None:
        self.writes = 0

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes += 1


def run(count: int = 10_000, rounds: int = 9) -> ExitsOutput:
    """Measure each method.

    :raises CapabilityError: without /dev/kvm
    """
    ways: dict[MethodName, Callable[[int], float]] = {
        _MINIMAL: _minimal,
        "C run loop": _in_c,
        "Python device": _in_python,
        "ioeventfd": _by_eventfd,
        "coalesced": _coalesced,
    }
    times: dict[MethodName, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(count // 10)
    for turn in range(rounds):
        names = list(ways)
        first = turn % len(names)  # rotate the method that starts a round
        for name in names[first:] + names[:first]:
            times[name].append(ways[name](count))
    rows = [
        MethodRow(
            method=name,
            ns_per_exit=statistics.median(values) / count * 1e9,
            of_minimal_ratio=_ratio(values, times[_MINIMAL]),
        )
        for name, values in times.items()
    ]
    parameters = ExitsParameters(exits=count, rounds=rounds)
    return ExitsOutput(**bench_head("exits"), parameters=parameters, methods=rows)


def _ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Return the median of the per-round ratios: a slow period slows both variants."""
    return statistics.median(value / least for value, least in zip(values, base, strict=True))


def _machine(port: int, count: int) -> Machine:
    params = {"port": port, "count": count}
    return Machine(image_path("portout"), mem_bytes=4 << 20, engine="kvm", params=params)


def _minimal(count: int) -> float:
    with _machine(_PYTHON_PORT, count) as machine:
        assert isinstance(machine.engine, KvmEngine)
        core = machine.engine.cores[0].core
        start = time.perf_counter()
        seen = check(lib.kh_bench_exits(core.fd, core.run, EXIT_PORT), "kh_bench_exits")
        seconds = time.perf_counter() - start
    _expect(seen, count)
    return seconds


def _in_c(count: int) -> float:
    with _machine(DOORBELL_PORT, count) as machine:
        seconds = _to_the_end(machine)
        _expect(machine.doorbells, count)
    return seconds


def _in_python(count: int) -> float:
    counter = _Counter()
    with _machine(_PYTHON_PORT, count) as machine:
        machine.bus.add_port(_PYTHON_PORT, 4, counter)
        seconds = _timed(machine)
    _expect(counter.writes, count)
    return seconds


def _by_eventfd(count: int) -> float:
    bell = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        with _machine(_PYTHON_PORT, count) as machine:
            assert isinstance(machine.engine, KvmEngine)
            machine.engine.vm.ioeventfd(bell, _PYTHON_PORT, 4, port=True)
            seconds = _to_the_end(machine)
            _expect(os.eventfd_read(bell), count)
    finally:
        os.close(bell)
    return seconds


def _coalesced(count: int) -> float:
    """Empty the ring whenever it is full: the next write then causes an ordinary exit."""
    with _machine(_PYTHON_PORT, count) as machine:
        assert isinstance(machine.engine, KvmEngine)
        core, vm = machine.engine.cores[0], machine.engine.vm
        vm.coalesce(_PYTHON_PORT, 4, port=True)
        with CoalescedRing(vm, core) as ring:
            start = time.perf_counter()
            seen = 0
            while isinstance(vm_exit := core.run(), IoOut) and vm_exit.port != EXIT_PORT:
                seen += 1 + ring.drain()
            seen += ring.drain()
            seconds = time.perf_counter() - start
    _expect(seen, count)
    return seconds


def _to_the_end(machine: Machine) -> float:
    """Run the first vCPU in this thread, as the minimal loop does, until the guest ends."""
    assert isinstance(machine.engine, KvmEngine)
    core = machine.engine.cores[0]
    start = time.perf_counter()
    vm_exit = core.run(machine.bus.core)
    seconds = time.perf_counter() - start
    if not isinstance(vm_exit, IoOut) or vm_exit.port != EXIT_PORT:
        raise RuntimeError(f"the guest did not come to its end: {vm_exit}")
    return seconds


def _timed(machine: Machine) -> float:
    start = time.perf_counter()
    machine.start()
    machine.wait(timeout_s=120)
    return time.perf_counter() - start


def _expect(seen: int, count: int) -> None:
    if seen != count:
        raise RuntimeError(f"{seen} exits seen, {count} made")


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(prog="kvmhost bench exits", description=about(__doc__))
    parser.add_argument(
        "--exits",
        type=count,
        default=10_000,
        metavar="N",
        help="exits of each measurement (default: %(default)s)",
    )
    add_option(parser, "--rounds", default=9, help="measurements of each method")
    add_option(parser, "--json")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the figures as a table, or as JSON."""
    options = parser().parse_args(argv)
    with working("bench exits"):
        result = run(options.exits, options.rounds)
    if options.json:
        emit(result)
        return 0
    for row in result.methods:
        print(f"{row.method:15} {row.ns_per_exit / 1000:7.2f} us an exit")
    for row in result.methods:
        if row.method != _MINIMAL:
            bound = BOUNDS[f"exits.{row.method}"]
            print(f"{row.method:15} {row.of_minimal_ratio:.3f} times the minimal C loop ({bound})")
    return 0
