"""VM and daemon processes of the demo: start, wait with progress checks, and end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from kvmhost.control.client import Client
from kvmhost.errors import GuestError, GuestTimeout, KvmHostError
from kvmhost.reclaim.pressure.cgroup import MemoryCgroup
from kvmhost.signals import signals_deferred
from kvmhost.temporary import temporary_folder
from kvmhost.timescale import scaled
from kvmhost.tools.demo.settings import DemoSettings

__all__ = [
    "DemoVm",
    "exit_status",
    "has_limit",
    "more_harvests",
    "open_log",
    "start_daemon",
    "start_vm",
    "wait_until",
]

#: Without progress for this long, a process hangs. Generous, for slow and loaded hosts.
_STUCK_S = scaled(180.0)
_DAEMON_LOG = "reclaimd.log"


@dataclasses.dataclass
class DemoVm:
    """A VM process of the demo and a client connected to it."""

    process: subprocess.Popen[bytes]
    client: Client
    directory: Path

    def wait_for_end(self, each: Callable[[], None] = lambda: None) -> int:
        """Wait until the VM ends, while its guest makes progress; return its exit status.

        :param each: called about five times a second
        :raises GuestTimeout: if the guest makes no progress for :data:`_STUCK_S`
        """
        done, since_s = -1, time.monotonic()
        while self.process.poll() is None:
            # The VM may end between two requests.
            with contextlib.suppress(KvmHostError):
                each()
                now = self._work_done()
                if now != done:
                    done, since_s = now, time.monotonic()
            if time.monotonic() - since_s > _STUCK_S:
                raise GuestTimeout(_STUCK_S)
            time.sleep(0.2)
        return self.process.returncode

    def _work_done(self) -> int:
        """Return a number that grows while the guest touches memory."""
        counters = self.client.counters()
        pager = counters.pager or {}
        faults = pager.get("fault_ins", 0) + pager.get("evictions", 0)
        return int(counters.machine.doorbells + counters.machine.resident_bytes + faults)

    def report(self) -> dict[str, typing.Any]:
        """Return the output of ``run --json``; call it after the VM has ended."""
        exit_status(self.process, "the VM")
        text = (self.directory / "report.json").read_text()
        if not text.strip():
            errors = (self.directory / "vm.log").read_text()
            raise GuestError(f"the VM ended with {self.process.returncode}: {errors[-500:]}")
        report: dict[str, typing.Any] = json.loads(text)
        return report


@contextlib.contextmanager
def start_vm(
    settings: DemoSettings,
    name: str,
    *,
    epochs: int,
    group: MemoryCgroup | None = None,
    **params: int,
) -> Iterator[DemoVm]:
    """Start a VM process, in a cgroup if one is given; it starts paused if ``epochs`` is not 0."""
    words = [sys.executable, "-m", "kvmhost", "run", "hotcold", "--name", name, "--json"]
    words += ["--engine", settings.engine, "--mem", str(settings.mem_bytes)]
    if epochs:
        words.append("--paused")
    for key, value in (settings.params(epochs) | params).items():
        words += ["--param", f"{key}={value}"]
    with (
        temporary_folder("kvmhost-demo-") as directory,
        contextlib.ExitStack() as stack,
    ):
        report = stack.enter_context((directory / "report.json").open("wb"))
        log = stack.enter_context((directory / "vm.log").open("wb"))
        # The child waits for a line of input, so that it is in its cgroup before it allocates.
        gate = ["sh", "-c", 'read -r _ && exec "$@"', "sh", *words]
        with signals_deferred():
            process = subprocess.Popen(gate, stdin=subprocess.PIPE, stdout=report, stderr=log)
            stack.callback(_end, process)
        if group is not None:
            group.add_pid(process.pid)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
        vm = DemoVm(process, stack.enter_context(_connect(name, process)), directory)
        yield vm


@contextlib.contextmanager
def _connect(name: str, process: subprocess.Popen[bytes]) -> Iterator[Client]:
    deadline = time.monotonic() + _STUCK_S
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
def start_daemon(
    name: str, budget_bytes: int, interval_s: float, log: typing.BinaryIO
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a daemon for one VM; the context manager ends it."""
    words = [sys.executable, "-m", "kvmhost", "reclaimd", name]
    words += ["--budget", str(budget_bytes), "--interval", str(interval_s)]
    with log, contextlib.ExitStack() as stack:
        with signals_deferred():
            process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(_end, process)
        yield process


def open_log(directory: Path) -> typing.BinaryIO:
    """Open the daemon's log in append mode."""
    return (directory / _DAEMON_LOG).open("ab")


def exit_status(process: subprocess.Popen[bytes], what: str) -> int:
    """Wait for a process that is about to end; return its exit status."""
    try:
        return process.wait(timeout=_STUCK_S)
    except subprocess.TimeoutExpired as error:
        raise GuestError(f"{what} did not end within {_STUCK_S:g} s") from error


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that this demo started: SIGTERM first, SIGKILL if that is not enough."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def has_limit(vm: DemoVm) -> Callable[[], bool]:
    """Return a condition: the VM's resident memory is limited."""
    return lambda: vm.client.state().resident_max_bytes > 0


def more_harvests(vm: DemoVm, than: int) -> Callable[[], bool]:
    """Return a condition: the VM was harvested more than ``than`` times."""
    return lambda: vm.client.counters().harvest.harvests > than


def wait_until(
    condition: Callable[[], bool],
    vm: DemoVm,
    what: str,
    daemon: subprocess.Popen[bytes] | None = None,
) -> None:
    """Wait for a condition while the VM runs.

    :param daemon: what has to bring it about
    :raises GuestError: if the VM or the daemon ends first, or makes no progress for too long
    """
    deadline = time.monotonic() + _STUCK_S
    while not condition():
        if vm.process.poll() is not None:
            raise GuestError(f"the VM ended with {vm.process.returncode} before {what}")
        if daemon is not None and daemon.poll() is not None:
            raise GuestError(
                f"the daemon ended with {daemon.returncode} before {what}: {_last_line(vm)}"
            )
        if time.monotonic() > deadline:
            raise GuestError(f"not within {_STUCK_S:g} s: {what}")
        time.sleep(0.05)


def _last_line(vm: DemoVm) -> str:
    """Return what the daemon of a VM wrote last."""
    lines = (vm.directory / _DAEMON_LOG).read_text(errors="replace").splitlines()
    return lines[-1] if lines else "it wrote nothing"
