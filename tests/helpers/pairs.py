"""Runs several actors at once on a guest that checks its bytes, and compares its memory after.

An actor (:mod:`actors`) does one thing to a VM, over and over, in a thread of its own. The
guest is ``hotcold``. What counts is events: operations of each actor, and epochs of the
guest. After them the guest is stopped at a doorbell, where every byte of its range is known
(:mod:`hotcold_model`), and nothing that an actor did may be left: no pause, no freeze,
no waiting fault, no page whose state is not where the page is.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
import time
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hotcold_model import expected_pages
from waiting import until

from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.machine.base import BaseMachine
from kvmhost.memory.guest import GuestMemory
from kvmhost.pager.results import EvictOutcome, PageState
from kvmhost.timescale import scaled
from kvmhost.units import PAGE_BYTES

if typing.TYPE_CHECKING:
    from actors import Actor

__all__ = ["FIXED", "GUEST", "LIMIT_PAGES", "Stopped", "World", "run_together", "within"]

#: gfns of the guest's range: three pieces of 2 MiB.
GUEST = range(1024, 2560)
#: gfns that hold data of the VMM, which never changes; behind the guest's notes.
FIXED = range(2600, 2856)
_SCRATCH = range(2856, 3600)
MEM_BYTES = 16 << 20
N_VCPUS = 2
#: The resident limit that must hold at the end, pinned pages and tables included.
LIMIT_PAGES = 600
#: Without one operation of an actor for so long, it hangs: a machine 20 times slower does not.
STALL_S = scaled(90.0)

PARAMS = {
    "gfn_start": GUEST.start, "pages": len(GUEST), "hot": 150, "cold": 32, "scan_every": 4,
    "scan_epochs": 2, "write_permille": 500, "epochs": 0,
}  # fmt: skip
#: With what the guest's source says where nothing is said here.
MODEL = PARAMS | {
    "same_filled_permille": 250, "seed": 1, "passes": 1, "zipf": 0, "zipf_permille": 900,
    "phase_every": 0, "phase_step": 768,
}  # fmt: skip


class Stopped(Exception):
    """The run is over while an actor waits; no failure."""


class World:
    """One VM, and what the actors share."""

    def __init__(self, engine: str, folder: Path, actors: Sequence[Actor]) -> None:
        self.folder, self.engine = folder, engine
        self.permits = frozenset().union(*(actor.permits for actor in actors))
        self.stopping = threading.Event()
        self._scratch = _SCRATCH.start
        given: dict[str, Any] = {}
        for actor in actors:
            given |= actor.options()
        params = PARAMS | given.pop("params", {})
        self.machine = Machine(
            image_path("hotcold"),
            mem_bytes=MEM_BYTES,
            n_vcpus=N_VCPUS,
            engine=engine,
            params=params,
            **given,
        )
        try:
            self.machine.memory.array(FIXED.start * PAGE_BYTES, (len(FIXED), 512), "<u8")[:] = (
                fixed_pages(FIXED)
            )
            self.pager = self.machine.open_pager()
            self.pager.arm()
            for actor in actors:
                actor.enter(self)
        except BaseException:
            self.machine.close()
            raise

    def take_scratch(self, n_pages: int) -> int:
        """Return the first of so many gfns that nobody else writes."""
        gfn, self._scratch = self._scratch, self._scratch + n_pages
        assert self._scratch <= _SCRATCH.stop
        return gfn

    def epochs_done(self) -> int:
        """Return how many epochs every vCPU has finished, the first that fills memory too."""
        return min(vcpu.doorbells for vcpu in self.machine.vcpus)

    def touches(self) -> int:
        """Return how many pages the guest has touched so far."""
        return sum(self.machine.result(vcpu).touches for vcpu in range(N_VCPUS))

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for a condition; whoever waits is watched by :func:`run_together`.

        :raises Stopped: if the run ends before
        """
        while not condition():
            if self.stopping.is_set():
                raise Stopped
            self.assert_runs(what)
            time.sleep(0.001)

    def assert_runs(self, what: str) -> None:
        """Fail if the guest has ended: it never does by itself."""
        machine = self.machine
        assert machine.running, (
            f"{what}: the guest ended with status {machine.status}, {machine.error!r}: "
            f"{machine.console_text()[-300:]!r}, {[machine.result(v) for v in range(N_VCPUS)]}"
        )

    def permitted(self, *more: EvictOutcome) -> set[EvictOutcome]:
        """Return the outcomes that evictions may have beside these actors."""
        usual = {EvictOutcome.DONE, EvictOutcome.PINNED, EvictOutcome.ABSENT, *more}
        return usual | {outcome for outcome in EvictOutcome if outcome.name in self.permits}

    def assert_fixed(self, gfns: Iterable[int] = FIXED) -> None:
        """Read pages of the VMM through the alias, and compare every byte."""
        gfns = range(min(gfns), max(gfns) + 1)
        found = read_pages(self.machine.memory, gfns)
        np.testing.assert_array_equal(found, fixed_pages(gfns), f"pages of the VMM, {gfns}")

    # -- the end ----------------------------------------------------------------

    def stop_at_doorbell(self) -> None:
        """Stop each vCPU at its next doorbell: from here on memory is what epochs wrote."""
        self.machine.step_by_doorbell()
        assert self.machine.run_epoch(STALL_S)
        self.assert_runs("at the end")

    def assert_nothing_held(self) -> None:
        """Fail if an actor left a pause, a freeze or a fault that waits."""
        assert not self.machine.paused, "a pause is left"
        within(lambda: self.pager.set_limit(0), "to set a limit: the pager is frozen")
        until(lambda: self.pager.counters()["pending_faults"] == 0, "no fault that waits")

    def assert_states(self) -> None:
        """Compare states and counters with what the memfd holds; nothing may run."""
        states, held = self.pager.states(), self.machine.memory.held()
        wrong = np.flatnonzero((states == PageState.RESIDENT) != held)
        assert not wrong.size, [(hex(i), PageState(states[i]).name) for i in wrong[:8]]
        counters = self.pager.counters()
        assert counters["resident_pages"] == held.sum()
        assert counters["evicted_pages"] == (states == PageState.EVICTED).sum()
        assert counters["lost_pages"] == 0
        assert counters["errors"] == 0 or "ERROR" in self.permits, counters["outcomes"]

    def assert_limit(self) -> None:
        """Fail unless a limit still holds, whatever the actors had refused."""
        self.pager.set_limit(LIMIT_PAGES * 4096)
        shrunk = self.pager.shrink()
        if "FULL" not in self.permits:
            assert shrunk.over_pages == 0
            assert self.pager.counters()["resident_pages"] <= LIMIT_PAGES

    def assert_memory(self) -> None:
        """Compare every byte of the guest's range, and of the VMM's pages."""
        assert_hotcold_memory(self.machine)
        self.assert_fixed()

    def assert_drained(self) -> None:
        """Bring all back, and fail if the store keeps anything."""
        result = self.pager.drain()
        assert (result.lost, result.left) == (0, 0)
        counters = self.pager.counters()
        assert (counters["evicted_pages"], counters["store_bytes"]) == (0, 0)

    def close(self) -> None:
        """End the VM; fail if that takes for ever."""
        within(self.machine.close, "the end of the VM")


def run_together(
    world: World, actors: Sequence[Actor], *, epochs: int = 20, seconds: float = 0.0
) -> None:
    """Start the guest and all actors; return after enough of everything, and the checks.

    :param epochs: that each vCPU finishes at least, while every actor finishes at least
        its ``operations``
    :param seconds: how long to go on at least
    """
    failures: list[tuple[Actor, BaseException]] = []
    threads = [
        threading.Thread(target=_work, args=(world, a, failures, epochs), name=a.name, daemon=True)
        for a in actors
    ]
    world.machine.start()
    world.until(lambda: world.epochs_done() > 0, "epoch 0")
    for thread in threads:
        thread.start()
    try:
        _watch(world, actors, failures, epochs, seconds)
    finally:
        world.stopping.set()
    deadline = time.monotonic() + STALL_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        raise AssertionError(f"an actor does not come back\n{_report(actors)}")
    _raise_first(failures, actors)
    _check_end(world, actors)


def _check_end(world: World, actors: Sequence[Actor]) -> None:
    world.pager.inject_failures()
    world.assert_nothing_held()
    world.stop_at_doorbell()
    world.assert_states()
    world.assert_limit()
    world.assert_memory()
    for actor in actors:
        actor.finish()
    world.assert_nothing_held()
    world.assert_drained()
    world.assert_states()
    assert world.machine.run_epoch(STALL_S)
    world.assert_memory()


def _work(
    world: World, actor: Actor, failures: list[tuple[Actor, BaseException]], epochs: int
) -> None:
    """Spread the operations of an actor over the epochs of the guest: both go on side by side."""
    try:
        while not world.stopping.is_set():
            allowed = 1 + actor.operations * (world.epochs_done() - 1) / epochs
            if actor.done >= allowed:
                time.sleep(0.001)
                continue
            actor.act()
            actor.done += 1
    except Stopped:
        return
    except BaseException as error:  # noqa: BLE001 - the main thread raises it
        failures.append((actor, error))


def _watch(
    world: World,
    actors: Sequence[Actor],
    failures: list[tuple[Actor, BaseException]],
    epochs: int,
    seconds: float,
) -> None:
    start = time.monotonic()
    seen: list[int] = []
    since: list[float] = []
    while True:
        rung = world.epochs_done()
        counts, now = [rung, *(actor.done for actor in actors)], time.monotonic()
        enough = rung > epochs and all(actor.done >= actor.operations for actor in actors)
        if enough and now - start >= seconds:
            return
        _raise_first(failures, actors)
        world.assert_runs("while the actors work")
        since = [
            now if not seen or count != old else last
            for count, old, last in zip(counts, seen or counts, since or counts, strict=True)
        ]
        seen = counts
        if now - min(since) > STALL_S:
            raise AssertionError(
                f"nothing for {STALL_S:g} s: epochs and operations {counts}\n{_report(actors)}"
            )
        time.sleep(0.002)


def _raise_first(failures: list[tuple[Actor, BaseException]], actors: Sequence[Actor]) -> None:
    if failures:
        actor, error = failures[0]
        raise AssertionError(f"{actor.name}: {error!r}\n{_last(actors)}") from error


def _last(actors: Sequence[Actor]) -> str:
    return "\n".join(f"{a.name}: {a.done} operations, then: {a.last}" for a in actors)


def _report(actors: Sequence[Actor]) -> str:
    """Return what each actor did last, and the stacks of all threads."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return f"{_last(actors)}\n{file.read()}"


def within(call: Callable[[], object], what: str, seconds: float = STALL_S) -> None:
    """Make a call that must come back; fail with all stacks if it does not."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise AssertionError(f"not within {seconds:g} s: {what}\n{_report(())}")
    if failed:
        raise failed[0]


# -- memory ------------------------------------------------------------------------


def fixed_pages(gfns: range) -> npt.NDArray[np.uint64]:
    """Return what the pages of the VMM hold: 512 words by gfn; every fourth is the same word."""
    rows = np.arange(gfns.start, gfns.stop, dtype=np.uint64)[:, None]
    words = np.where(rows % 4 == 0, 0, np.arange(512, dtype=np.uint64))
    return rows * np.uint64(0x9E3779B97F4A7C15) + words


def read_pages(memory: GuestMemory, gfns: range) -> npt.NDArray[np.uint64]:
    """Read pages through the alias as words: shape ``(n, 512)``.

    The kernel copies them: whoever waits for a page does not hold the interpreter lock,
    and one that is lost is an OSError instead of a signal.
    """
    n_bytes = len(gfns) * PAGE_BYTES
    copy = os.memfd_create("copy")
    try:
        with memory.view(gfns.start * PAGE_BYTES, n_bytes) as view:
            done = 0
            while done < n_bytes:
                done += os.pwrite(copy, view[done:], done)
        return np.frombuffer(os.pread(copy, n_bytes, 0), dtype="<u8").reshape(-1, 512)
    finally:
        os.close(copy)


def assert_hotcold_memory(machine: BaseMachine) -> None:
    """Compare the range of a guest that stands at its doorbells with what its epochs wrote."""
    finished = [vcpu.doorbells for vcpu in machine.vcpus]
    expected = expected_pages(MODEL, finished)
    for first in range(0, len(GUEST), 64):
        gfns = range(GUEST.start + first, GUEST.start + first + 64)
        found = read_pages(machine.memory, gfns)
        wrong = np.flatnonzero((found != expected[first : first + 64]).any(axis=1))
        assert not wrong.size, (
            f"after epochs {finished}: {wrong.size} of 64 pages differ, gfn "
            f"{gfns[int(wrong[0])]:#x} first: {found[wrong[0]][:4]}, "
            f"not {expected[first + wrong[0]][:4]}"
        )
