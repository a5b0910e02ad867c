"""Part ``guests``: KVM guests under a limit, with one pass per second, and its cost."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.reclaim.policy.base import Policy
from kvmhost.reclaim.policy.belady import belady
from kvmhost.reclaim.policy.registry import create
from kvmhost.signals import start_threads
from kvmhost.tools.bench.reclaim.inprocess import Pass, Reclaimer, check
from kvmhost.tools.bench.reclaim.workloads import WORKLOADS, guest_params
from kvmhost.tools.outputs.benchparts import CostRow, LimitedGuestRow
from kvmhost.units import PAGE_BYTES

__all__ = ["POLICIES", "booted", "cost", "run"]

POLICIES = ("lru_gen", "classic", "age", "random")
_INTERVAL_S = 1.0
#: Interval while refaults are counted: shorter, for more passes in the same time.
_SHORT_INTERVAL_S = 0.25
_SETTLE_S = 2.0
_FITS = ("fits", "fits-armed")
#: Guest memory outside the touched range: image, page tables, the guest's data per page.
_EXTRA_BYTES = 16 << 20


def run(
    workloads: Sequence[str],
    pages: int,
    seconds: float,
    budgets: Sequence[float],
    tell: Callable[[str], None],
) -> list[LimitedGuestRow]:
    """Run workloads as guests; return one row per workload, budget and policy.

    :raises CapabilityError: without /dev/kvm
    """
    rows = []
    for name in [*(w for w in workloads if "sparse" not in w), *_FITS]:
        for policy in POLICIES:
            for budget in budgets if name not in _FITS else (0.75,):
                tell(f"guests {name}, {policy}, budget {budget:.0%}")
                rows.append(_measure(name, policy, pages, seconds, budget))
    return rows


def _params(name: str, pages: int) -> list[dict[str, int]]:
    """Return the parameters of a workload's guests: epochs of milliseconds, without end.

    ``fits`` is the guest of the performance target: its hot set, half of its memory, fits
    the budget. ``fits-armed`` is compared with a guest that has no limit but whose pager
    handles faults too: a mapping that is registered with userfaultfd has no fault-around,
    so each harvest costs more faults.
    """
    if name in _FITS:
        fits = {"hot": pages // 2, "cold": 1}
        return [guest_params(lambda p: fits, pages) | {"epochs": 0}]
    guests = WORKLOADS[name].guests
    share = pages // len(guests)
    found = []
    for guest in guests:
        params = guest_params(guest, share) | {"epochs": 0}
        # A window contains many epochs: fewer draws per epoch keep those of a window similar.
        for key in ("cold", "zipf"):
            params[key] = -(-params[key] // 64)
        found.append(params)
    return found


def _measure(name: str, policy: str, pages: int, seconds: float, budget: float) -> LimitedGuestRow:
    """Run the same guests twice, without and with a limit, in alternating segments."""
    interval_s = _INTERVAL_S if name in _FITS else _SHORT_INTERVAL_S
    with contextlib.ExitStack() as stack:
        free = [_free(stack, params) for params in _params(name, pages)]
        bound = [_free(stack, params) for params in _params(name, pages)]
        if name == "fits-armed":
            for one in free:
                one.machine.open_pager().arm()
        touched = [int(machine.resident().sum()) for machine in bound]
        limited = [
            Reclaimer(r.machine, _make(policy, r.n_pages), int(n * budget))
            for r, n in zip(bound, touched, strict=True)
        ]
        _segment(limited, _SETTLE_S, interval_s)
        _segment(free, _SETTLE_S / 2, interval_s)
        start = _fault_ins(limited), sum(r.machine.doorbells for r in limited)
        turns = max(round(seconds), 1)
        pairs = [
            (_segment(free, 1.0, interval_s), _segment(limited, 1.0, interval_s))
            for _ in range(turns)
        ]
        epochs = sum(r.machine.doorbells for r in limited) - start[1]
        passes = [done for r in limited for done in r.passes]
        return LimitedGuestRow(
            workload=name,
            policy=policy,
            budget_share=budget,
            touched_pages=sum(touched),
            throughput_of_no_limit_ratio=statistics.median(with_ / none for none, with_ in pairs),
            epochs_per_s=statistics.median(with_ for _, with_ in pairs),
            fault_ins_per_epoch=(_fault_ins(limited) - start[0]) / max(epochs, 1),
            refaulted_pages=sum(r.refaulted_pages for r in limited),
            # The policy with two lists harvests nothing that could be replayed.
            belady_refaults=None
            if policy == "classic"
            else sum(belady(r.windows(), r.n_pages, r.budget_pages).refaults for r in limited),
            wrong_evictions=sum(r.wrong_evictions for r in limited),
            busy_ms_per_pass=sum(done.busy_ns for done in passes) / len(passes) / 1e6,
        )


def _make(name: str, n_pages: int) -> Policy:
    # The two lists as in the kernel: each page is tested separately at the end of its list.
    return create(name, n_pages, {"probes": True} if name == "classic" else None)


def _free(stack: contextlib.ExitStack, params: Mapping[str, int]) -> Reclaimer:
    """Boot a guest, stop waiting for it after each epoch, and leave it paused."""
    machine = stack.enter_context(booted(params))
    machine.pause()
    machine.step_by_doorbell(False)
    return Reclaimer(machine, None, 0)


def _fault_ins(reclaimers: Sequence[Reclaimer]) -> int:
    return sum(int(r.machine.open_pager().counters()["fault_ins"]) for r in reclaimers)


@contextlib.contextmanager
def booted(params: Mapping[str, int], image: str = "hotcold") -> Iterator[Machine]:
    """Yield a guest that is stopped after its first epoch, which wrote all its pages."""
    range_bytes = (params["gfn_start"] + params["pages"]) * PAGE_BYTES
    mem_bytes = -(-(range_bytes + _EXTRA_BYTES) // (2 << 20)) * (2 << 20)
    with Machine(image_path(image), mem_bytes=mem_bytes, engine="kvm", params=params) as machine:
        machine.step_by_doorbell()
        machine.run_epoch()
        yield machine
        check(machine)


def _segment(reclaimers: Sequence[Reclaimer], seconds: float, interval_s: float) -> float:
    """Resume paused guests with a pass each interval; return the sum of their epochs per second."""
    stop = threading.Event()
    threads = [
        threading.Thread(target=r.run_until, args=(stop, interval_s), name="reclaim")
        for r in reclaimers
    ]
    machines = [r.machine for r in reclaimers]
    first, start = sum(m.doorbells for m in machines), time.perf_counter()
    for machine in machines:
        machine.resume()
    try:
        start_threads(*threads)
        stop.wait(seconds)
        for machine in machines:
            machine.pause()
        rate = (sum(m.doorbells for m in machines) - first) / (time.perf_counter() - start)
    finally:
        stop.set()
        for thread in threads:
            if thread.is_alive():
                thread.join()
    for machine in machines:
        check(machine)
    return rate


def cost(mem_bytes: int, seconds: float, tell: Callable[[str], None]) -> list[CostRow]:
    """Return the cost of one pass per second for a large guest in steady state."""
    pages = (mem_bytes - _EXTRA_BYTES) // PAGE_BYTES - 4096
    params = guest_params(lambda p: {"hot": p // 4, "cold": 16}, pages)
    params |= {"epochs": 0, "words": 8}
    rows = []
    for policy in ("lru_gen", "age"):
        tell(f"cost of {policy} for {mem_bytes >> 20} MiB")
        with contextlib.ExitStack() as stack:
            whole = _free(stack, params)
            touched = int(whole.resident().sum())
            reclaimer = Reclaimer(whole.machine, create(policy, whole.n_pages), touched * 3 // 4)
            _segment([reclaimer], 4 * _SETTLE_S, _INTERVAL_S)
            settled = len(reclaimer.passes)
            _segment([reclaimer], seconds, _INTERVAL_S)
            passes = reclaimer.passes[settled:]
            rows.append(_cost_row(policy, whole.n_pages * PAGE_BYTES / 2**30, passes))
    return rows


def _cost_row(policy: str, gib: float, passes: Sequence[Pass]) -> CostRow:
    def percent(times_ns: Iterable[int]) -> float:
        """Return the mean of times in passes of a second, as % of a core per GiB."""
        return statistics.fmean(times_ns) / 1e7 / gib

    return CostRow(
        policy=policy,
        guest_gib=gib,
        busy_percent_per_gib=percent(one.busy_ns for one in passes),
        policy_percent_per_gib=percent(one.policy_ns for one in passes),
        harvest_percent_per_gib=percent(one.harvest_ns for one in passes),
    )
