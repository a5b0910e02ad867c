"""Kicks and everything that stands on them: pauses, steps, snapshots and stops at once."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import until

from kvmhost._ffi import lib
from kvmhost.engine.kvm import KvmEngine
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.machine.snapshot import save_machine

ENGINES = [pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]
pytestmark = pytest.mark.usefixtures("nothing_left")

SOON = 150.0
MIB = 1 << 20
Make = Callable[..., Machine]


def endless(make_vm: Make, engine: str, n_vcpus: int = 1) -> Machine:
    """Return a guest that checks what it wrote and never ends."""
    params = {"pages": 128, "hot": 16, "epochs": 0, "scan_every": 1}
    return make_vm(
        image_path("hotcold"), mem_bytes=6 * MIB, engine=engine, n_vcpus=n_vcpus, params=params
    )


def in_threads(*works: Callable[[], object]) -> None:
    """Run all at once, and raise what the first to fail raised."""
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert not [thread for thread in threads if thread.is_alive()], "a thread never came back"
    if errors:
        raise errors[0]


@pytest.mark.requires_kvm
def test_a_kick_in_the_middle_of_a_kick(make_vm: Make) -> None:
    """A raises the flag and is preempted; B's kick is consumed whole; A goes on."""
    machine = endless(make_vm, "kvm")
    machine.start()
    until(lambda: machine.doorbells > 0, "the guest runs")
    assert isinstance(machine.engine, KvmEngine)
    core = machine.engine.cores[0].core
    for _ in range(20):
        core.run.immediate_exit = 1
        machine.vcpus[0].kick()
        until(lambda: not core.run.immediate_exit, "the flag is lowered")
        core.run.immediate_exit = 1
        if core.tid:
            lib.kh_kick_thread(core.tid)
        seen = machine.doorbells
        until(lambda seen=seen: machine.doorbells > seen + 1, "the guest runs on")
        until(lambda: not core.run.immediate_exit, "the flag is lowered")
    machine.stop()


@pytest.fixture
def no_queued_signals() -> Iterator[None]:
    """Let no signal be queued, as for a user who has too many pending."""
    before = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_SIGPENDING, before)


@pytest.mark.requires_kvm
@pytest.mark.usefixtures("no_queued_signals")
def test_pauses_with_no_room_for_queued_signals(make_vm: Make) -> None:
    machine = endless(make_vm, "kvm", n_vcpus=2)
    machine.start()
    for _ in range(20):
        machine.pause()
        seen = machine.doorbells
        machine.resume()
        until(lambda seen=seen: machine.doorbells > seen, "the guest runs on")
    machine.stop()


@pytest.mark.requires_kvm
def test_a_kick_where_the_signal_was_ignored() -> None:
    """As after ``trap '' URG`` in a shell: exec passes it on."""
    script = (
        "from kvmhost.guests import image_path; from kvmhost.machine import Machine\n"
        "with Machine(image_path('touch'), mem_bytes=4 << 20, engine='kvm', "
        "params={'pages': 64, 'epochs': 0}) as m:\n"
        "    m.start()\n"
        "    while not m.doorbells and m.error is None: pass\n"
        "    m.pause(60)\n"
        "    print('paused')\n"
    )
    number = lib.kh_kick_signal()
    done = subprocess.run(
        ["sh", "-c", f"trap '' {number}; exec \"$@\"", "sh", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("paused\n", "", 0)
    assert number < signal.SIGRTMIN


@pytest.mark.parametrize("engine", ENGINES)
def test_pause_before_start(engine: str, make_vm: Make) -> None:
    machine = endless(make_vm, engine)
    machine.pause(SOON)
    assert machine.still
    machine.start()
    assert machine.doorbells == 0
    assert set(machine.describe_vcpus()) == {0}
    machine.resume()
    until(lambda: machine.doorbells > 0, "the guest runs")
    machine.stop()


@pytest.mark.requires_kvm
def test_snapshot_before_start(make_vm: Make, tmp_path: Path) -> None:
    machine = endless(make_vm, "kvm")
    assert save_machine(machine, tmp_path / "early") > 0


class Storm:
    """What one VM is asked for by many threads at once; each does its share of rounds."""

    def __init__(self, machine: Machine, folder: Path, rounds: int) -> None:
        self.machine, self.folder, self.rounds = machine, folder, rounds
        self.is_kvm = machine.engine.name == "kvm"

    def pause(self) -> None:
        for _ in range(self.rounds):
            self.machine.pause(SOON)
            self.machine.resume()

    def resume(self) -> None:
        """Resume what others have paused: it ends their pauses, and no hold."""
        for _ in range(self.rounds):
            self.machine.resume()

    def hold(self) -> None:
        for _ in range(self.rounds):
            with self.machine.stopped_vcpus(SOON):
                seen = self.machine.doorbells, self.machine.vcpus[0].registers()
                self.machine.engine.flush_tlbs()
                assert (self.machine.doorbells, self.machine.vcpus[0].registers()) == seen

    def step(self) -> None:
        for _ in range(self.rounds // 4):
            self.machine.step_by_doorbell()
            try:
                self.machine.run_epoch(SOON)
            except RuntimeError:  # the other stepper has ended it already
                continue
            finally:
                self.machine.step_by_doorbell(False)

    def snapshot(self) -> None:
        if not self.is_kvm:
            return
        path = self.folder / threading.current_thread().name
        for _ in range(self.rounds // 10):
            assert save_machine(self.machine, path) > 0

    def describe(self) -> None:
        for _ in range(self.rounds):
            assert set(self.machine.describe_vcpus()) == {0, 1}

    def all(self) -> list[Callable[[], None]]:
        twice = [self.pause, self.hold, self.step, self.snapshot, self.describe]
        return [*twice, *twice, self.resume]


@pytest.mark.parametrize("engine", ENGINES)
def test_everything_at_once(engine: str, make_vm: Make, tmp_path: Path) -> None:
    machine = endless(make_vm, engine, n_vcpus=2)
    machine.start()
    in_threads(*Storm(machine, tmp_path, 120).all())
    assert machine.error is None
    # Nothing is left behind: no pause, no hold, no stop at doorbells, no flag.
    assert not machine.paused
    seen = machine.doorbells
    until(lambda: machine.doorbells > seen + 4, "the guest runs on")
    machine.pause(SOON)
    assert machine.still
    assert [machine.result(i).status for i in range(2)] == [0, 0]
    machine.stop()
    assert machine.error is None


@pytest.mark.parametrize("engine", ENGINES)
def test_stops_in_the_middle_of_everything(engine: str, make_vm: Make, tmp_path: Path) -> None:
    for round_ in range(4):
        machine = endless(make_vm, engine, n_vcpus=2)
        storm = Storm(machine, tmp_path, 8)

        def stop(machine: Machine = machine, doorbells: int = round_) -> None:
            while machine.doorbells < doorbells:
                pass
            machine.stop()

        if round_:
            machine.start()
        in_threads(*storm.all(), stop, stop)
        assert not machine.running
        assert machine.error is None
        machine.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_guest_prints_on_and_pauses_though_nobody_reads(engine: str, make_vm: Make) -> None:
    reader, writer = os.pipe()
    params = {"port": 0x3F8, "count": 1 << 40}
    machine = make_vm(
        image_path("portout"), mem_bytes=4 * MIB, engine=engine, console_fd=writer, params=params
    )
    machine.serial.write(b"x" * (2 * lib.KH_SINK_BYTES))  # pipe and buffer are full
    machine.start()
    for _ in range(3):
        seen = machine.serial.lost_bytes
        until(lambda seen=seen: machine.serial.lost_bytes > seen, "the guest prints on")
        machine.pause(SOON)
        machine.resume()
    machine.stop()
    machine.close()
    os.close(reader)
    os.close(writer)
