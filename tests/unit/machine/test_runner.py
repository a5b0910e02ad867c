"""The runner on vCPUs that are made of threads and events: order is chosen, not hoped for."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from kvmhost.errors import PauseTimeout
from kvmhost.exits import Exit, IoOut, Kicked
from kvmhost.machine.runner import Runner, Step

SOON = 60.0
DOORBELL = IoOut(0x500, 4, bytes(4), 1)


class FakeVcpu:
    """Runs until it is kicked, or, if ``deaf``, until ``listen`` is set.

    ``bells`` doorbells are rung first, each as ``ring`` is released.
    """

    def __init__(self, index: int = 0, deaf: bool = False) -> None:
        self.index = index
        self.kick_error: Exception | None = None
        self.ring = threading.Semaphore(0)
        self.runs = self.kicks = 0
        self._changed = threading.Condition()
        self._kicked = self._inside = False
        self.listen = threading.Event()
        if not deaf:
            self.listen.set()

    def run(self) -> Exit:
        with self._changed:
            self.runs += 1
            self._inside = True
            self._changed.notify_all()
            while not (self._kicked and self.listen.is_set()):
                if self.ring.acquire(blocking=False):
                    self._inside = False
                    return DOORBELL
                self._changed.wait(0.01)
            self._inside = self._kicked = False
            self._changed.notify_all()
            return Kicked()

    def kick(self) -> None:
        if self.kick_error is not None:
            raise self.kick_error
        with self._changed:
            self.kicks += 1
            self._kicked = True
            self._changed.notify_all()

    def wait_inside(self, inside: bool = True) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._inside is inside, SOON)

    @property
    def inside(self) -> bool:
        with self._changed:
            return self._inside


def make(*vcpus: FakeVcpu, on_exit: Callable[..., Step] | None = None) -> Runner:
    return Runner(
        list(vcpus),  # type: ignore[arg-type]
        on_exit or (lambda vcpu, vm_exit: Step.HOLD),
        lambda vcpu, error: None,
    )


def test_pause_before_start_is_at_once_and_holds() -> None:
    vcpu = FakeVcpu()
    runner = make(vcpu)
    runner.pause()
    assert runner.still
    runner.start()
    runner.pause()
    assert vcpu.runs == 0
    runner.resume()
    runner.resume()
    vcpu.wait_inside()
    assert runner.stop()


def test_a_pause_that_is_too_late_undoes_itself() -> None:
    vcpus = FakeVcpu(0), FakeVcpu(1, deaf=True)
    runner = make(*vcpus)
    runner.start()
    for vcpu in vcpus:
        vcpu.wait_inside()
    with pytest.raises(PauseTimeout, match=r"vCPU 1 did not stop within 0\.2 s"):
        runner.pause(0.2)
    with pytest.raises(PauseTimeout), runner.hold(0.2):
        pass
    assert not runner.paused
    vcpus[0].wait_inside()
    vcpus[1].listen.set()
    runner.pause()
    assert not vcpus[0].inside
    assert not vcpus[1].inside
    assert runner.stop()


def test_a_kick_that_fails_undoes_the_pause() -> None:
    vcpus = FakeVcpu(0), FakeVcpu(1)
    runner = make(*vcpus)
    runner.start()
    for vcpu in vcpus:
        vcpu.wait_inside()
    vcpus[1].kick_error = OSError(11, "no room in the signal queue")
    with pytest.raises(OSError, match="no room"):
        runner.pause()
    assert not runner.paused
    vcpus[1].kick_error = None
    vcpus[0].wait_inside()
    assert runner.stop()


def test_nobody_else_ends_a_hold() -> None:
    vcpu = FakeVcpu()
    runner = make(vcpu)
    runner.start()
    vcpu.wait_inside()
    with runner.hold():
        runs = vcpu.runs
        runner.resume()  # one too many
        runner.pause()
        runner.resume()
        assert runner.still
        assert vcpu.runs == runs
    vcpu.wait_inside()
    assert not runner.paused
    assert runner.stop()


def test_stop_before_start_ends_everything() -> None:
    vcpu = FakeVcpu()
    runner = make(vcpu)
    assert runner.stop()
    assert runner.wait_ended(0)
    runner.start()
    assert vcpu.runs == 0


def test_stop_ends_who_is_paused_and_lets_the_pauser_go() -> None:
    vcpus = FakeVcpu(0), FakeVcpu(1, deaf=True)
    runner = make(*vcpus)
    runner.start()
    for vcpu in vcpus:
        vcpu.wait_inside()
    pauser = threading.Thread(target=runner.pause)
    pauser.start()
    runner.request_stop()
    vcpus[1].listen.set()
    pauser.join(SOON)
    assert not pauser.is_alive()
    assert runner.stop(SOON)


def test_a_doorbell_that_comes_as_stepping_ends_holds_nobody() -> None:
    """The vCPU has left guest mode at a doorbell; before it parks, stepping is switched off."""
    vcpu = FakeVcpu()
    left, go_on = threading.Event(), threading.Event()

    def on_exit(vcpu: FakeVcpu, vm_exit: Exit) -> Step:
        left.set()
        assert go_on.wait(SOON)
        return Step.HOLD

    runner = make(vcpu, on_exit=on_exit)
    runner.set_stepping(True)
    runner.start()
    vcpu.ring.release()
    assert left.wait(SOON)
    runner.set_stepping(False)
    go_on.set()
    vcpu.wait_inside()  # for ever parked, as it was
    assert runner.stop()


def test_stepping_goes_from_bell_to_bell() -> None:
    vcpu = FakeVcpu()
    runner = make(vcpu)
    runner.set_stepping(True)
    runner.start()
    for _ in range(3):
        vcpu.ring.release()
        assert runner.wait_held(SOON)
        runner.release()
    runner.set_stepping(False)
    vcpu.wait_inside()
    assert runner.stop()
