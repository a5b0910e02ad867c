"""The threads that run vCPUs: starting, parking, stepping by epochs, stopping.

Each vCPU has one thread. A thread is *parked* while it waits between two runs:
because the machine is paused, or because the vCPU stopped at a doorbell and
has not been released; a thread that has not started counts as parked. Kicks
make a running vCPU return so that it can park; there is no polling.

All methods are thread-safe. The state that controls the vCPUs is protected by one
lock, and the vCPUs are kicked under it too, so none is kicked after it has ended.
A call that fails does not change the counts.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from kvmhost._ffi import check, lib
from kvmhost.engine.base import Vcpu
from kvmhost.errors import PauseTimeout, StateError
from kvmhost.exits import Exit, Kicked
from kvmhost.signals import start_threads
from kvmhost.timescale import scaled

__all__ = ["PAUSE_TIMEOUT_S", "Runner", "Step"]

#: Default time-out of a pause, in seconds.
PAUSE_TIMEOUT_S = scaled(30.0)
_STOP_TIMEOUT_S = scaled(10.0)


class Step(enum.Enum):
    """The action of a vCPU after an exit."""

    GO_ON = enum.auto()
    HOLD = enum.auto()  # park until released: it stopped at a doorbell
    WAIT = enum.auto()  # park until retry(): it stopped in a memory fault
    END = enum.auto()  # this vCPU is done
    END_ALL = enum.auto()  # all vCPUs are done


class Runner:
    """Runs the vCPUs of one machine.

    :param on_exit: called in the vCPU's thread with the vCPU and its exit
    :param on_error: called in the vCPU's thread if ``on_exit`` or the run raised
    """

    def __init__(
        self,
        vcpus: Sequence[Vcpu],
        on_exit: Callable[[Vcpu, Exit], Step],
        on_error: Callable[[Vcpu, BaseException], None],
    ) -> None:
        self._vcpus = list(vcpus)
        self._on_exit, self._on_error = on_exit, on_error
        self._changed = threading.Condition()
        self._paused = 0  # by pause(), undone by any resume()
        self._holds = 0  # by hold(), undone only by its own end
        self._stepping = False
        self._started = False
        self._stopping = False
        self._given_up = False
        self._held: set[int] = set()
        self._waiting: dict[int, Exit] = {}  # in a memory fault
        self._retries = 0
        self._parked = {vcpu.index for vcpu in self._vcpus}
        self._ended: set[int] = set()
        self._threads = [
            threading.Thread(target=self._loop, args=(vcpu,), name=f"vcpu{vcpu.index}", daemon=True)
            for vcpu in self._vcpus
        ]

    def start(self) -> None:
        """Start the threads. Does nothing after :meth:`stop`."""
        with self._changed:
            if self._started:
                raise StateError("the machine", "has been started before")
            self._started = True
            both = zip(self._vcpus, self._threads, strict=True)
            start_threads(*(thread for vcpu, thread in both if vcpu.index not in self._ended))

    def pause(self, timeout: float = PAUSE_TIMEOUT_S) -> None:
        """Park every vCPU and return when all are parked. Pauses nest.

        :raises PauseTimeout: if a vCPU is not parked in time; then nothing is paused
        """
        with self._changed:
            self._paused += 1
            try:
                self._wait_still(timeout)
            except BaseException:
                # Another thread may have resumed meanwhile, before this pause was complete.
                self._paused = max(0, self._paused - 1)
                self._changed.notify_all()
                raise

    def pause_at_start(self) -> None:
        """Pause before the threads run."""
        with self._changed:
            self._paused += 1

    def resume(self) -> None:
        """Undo one :meth:`pause`."""
        with self._changed:
            if self._paused:
                self._paused -= 1
            self._changed.notify_all()

    @contextlib.contextmanager
    def hold(self, timeout: float = PAUSE_TIMEOUT_S) -> Iterator[None]:
        """Keep every vCPU parked inside the context, regardless of pauses and resumes.

        :raises PauseTimeout: if a vCPU is not parked in time
        """
        with self._changed:
            self._holds += 1
        try:
            with self._changed:
                self._wait_still(timeout)
            yield
        finally:
            with self._changed:
                self._holds -= 1
                self._changed.notify_all()

    @property
    def paused(self) -> bool:
        """Whether a pause or a hold is in effect."""
        return self._paused > 0 or self._holds > 0

    @property
    def still(self) -> bool:
        """Whether a pause or a hold is in effect and all vCPUs are parked."""
        with self._changed:
            return self.paused and self._all_still()

    @property
    def stepping(self) -> bool:
        """Whether vCPUs park at doorbells."""
        return self._stepping

    def set_stepping(self, on: bool) -> None:
        """Make vCPUs park at doorbells, or stop doing so and release the parked ones."""
        with self._changed:
            self._stepping = on
        if not on:
            self.release()

    def release(self) -> None:
        """Release the vCPUs that stopped at doorbells."""
        with self._changed:
            self._held.clear()
            self._changed.notify_all()

    def retry(self) -> None:
        """Let the vCPUs that wait in a memory fault run again, and those that are about to."""
        with self._changed:
            self._retries += 1
            self._waiting.clear()
            self._changed.notify_all()

    @property
    def waiting(self) -> dict[int, Exit]:
        """The exits of the vCPUs that wait in a memory fault, by index."""
        with self._changed:
            return dict(self._waiting)

    def wait_waiting(self, timeout: float | None = None) -> bool:
        """Wait until every vCPU waits in a memory fault or has ended; False on timeout."""
        with self._changed:
            return self._changed.wait_for(
                lambda: len(self._ended | self._waiting.keys()) == len(self._vcpus), timeout
            )

    def wait_held(self, timeout: float | None = None) -> bool:
        """Wait until every vCPU stopped at a doorbell or ended; False on timeout.

        Returns at once if stepping is off, or as soon as it is switched off.
        """

        def arrived() -> bool:
            return len(self._held | self._ended) == len(self._vcpus)

        with self._changed:
            return self._changed.wait_for(
                lambda: self._given_up or not self._stepping or arrived(), timeout
            )

    def wait_ended(self, timeout: float | None = None) -> bool:
        """Wait until every vCPU has ended or :meth:`give_up`; False on timeout."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._given_up or len(self._ended) == len(self._vcpus), timeout
            )

    @property
    def ended(self) -> bool:
        """Whether every vCPU has ended."""
        return len(self._ended) == len(self._vcpus)

    def cpu_seconds(self) -> float:
        """Return the total processor time of all vCPU threads.

        It is constant only while all of them wait in the kernel.
        """
        total = 0.0
        for thread in self._threads:
            if thread.ident is not None and thread.is_alive():
                try:
                    total += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
                except OSError:
                    continue  # ended in between
        return total

    @property
    def ended_vcpus(self) -> set[int]:
        """Indexes of the vCPUs that have ended."""
        with self._changed:
            return set(self._ended)

    def mark_ended(self, indexes: set[int]) -> None:
        """Mark vCPUs as ended before the start: their threads do not start."""
        with self._changed:
            self._ended |= indexes & {vcpu.index for vcpu in self._vcpus}

    def request_stop(self) -> None:
        """Request every vCPU to end; does not wait."""
        with self._changed:
            self._stopping = True
            if not self._started:
                self._ended |= {vcpu.index for vcpu in self._vcpus}
            self._changed.notify_all()
            self._kick_all()

    def give_up(self) -> None:
        """Request every vCPU to end, and release all waiters: one may be stuck in a fault."""
        with self._changed:
            self._given_up = True
        self.request_stop()

    def stop(self, timeout: float = _STOP_TIMEOUT_S) -> bool:
        """End every vCPU and join the threads; False if one does not end."""
        self.request_stop()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # The caller of the methods below, up to _park(), holds the lock.

    def _kick_all(self) -> None:
        for vcpu in self._vcpus:
            if vcpu.index not in self._ended:
                vcpu.kick()

    def _wait_still(self, timeout: float) -> None:
        self._kick_all()
        if not self._changed.wait_for(self._all_still, timeout):
            awake = {vcpu.index for vcpu in self._vcpus} - self._parked - self._ended
            raise PauseTimeout(sorted(awake), timeout)

    def _all_still(self) -> bool:
        return len(self._parked | self._ended) == len(self._vcpus)

    def _may_run(self, index: int) -> bool:
        stays = index in self._held or index in self._waiting
        return self._stopping or not (self._paused or self._holds or stays)

    def _park(self, index: int) -> bool:
        """Wait until the vCPU may run; False if the machine stops."""
        with self._changed:
            if not self._may_run(index):
                self._parked.add(index)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._may_run(index))
            self._parked.discard(index)
            return not self._stopping

    def _loop(self, vcpu: Vcpu) -> None:
        check(lib.kh_thread_mask_signals(), "pthread_sigmask")
        step = Step.GO_ON
        try:
            while self._park(vcpu.index):
                retries = self._retries
                vm_exit = vcpu.run()
                if isinstance(vm_exit, Kicked):
                    continue
                step = self._on_exit(vcpu, vm_exit)
                if step is Step.HOLD:
                    self._hold(vcpu.index)
                elif step is Step.WAIT:
                    self._wait(vcpu.index, vm_exit, retries)
                elif step in (Step.END, Step.END_ALL):
                    break
        except BaseException as error:  # noqa: BLE001 - a thread has no caller
            self._on_error(vcpu, error)
            step = Step.END_ALL
        with self._changed:
            self._ended.add(vcpu.index)
            self._stopping = self._stopping or step is Step.END_ALL
            self._changed.notify_all()
            if step is Step.END_ALL:
                self._kick_all()

    def _hold(self, index: int) -> None:
        with self._changed:
            # Stepping may have been switched off since the vCPU left guest mode.
            if self._stepping:
                self._held.add(index)
            self._changed.notify_all()

    def _wait(self, index: int, vm_exit: Exit, retries: int) -> None:
        """Wait, unless there was a retry since the run began: the mapping may be back."""
        with self._changed:
            if self._retries == retries:
                self._waiting[index] = vm_exit
            self._changed.notify_all()
