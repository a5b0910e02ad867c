"""The thread of one VM: attach to it, run its passes, detach from it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from kvmhost.control.client import Client
from kvmhost.errors import CapabilityError, ControlError, KvmHostError, VmGoneError
from kvmhost.reclaim.account.decisions import DecisionKind
from kvmhost.reclaim.account.events import Dropped, Event
from kvmhost.reclaim.context import DaemonContext
from kvmhost.reclaim.vm.session import GuestEnded, Session, VmPaused
from kvmhost.signals import start_threads

__all__ = ["VmWorker"]

#: Consecutive refusals after which a VM is dropped.
_MAX_REFUSALS = 5
#: A pass that exceeds the interval is followed by a pause of at least this share of it.
_MIN_IDLE_SHARE = 0.1
#: How often to retry a VM that does not exist yet.
_RETRY_S = 0.1
#: HTTP status: the VM has no pager; another daemon holds its lease.
_LOCKED = 423
_LACKING = 501  # a capability is missing on the host of the VM


class VmWorker:
    """Manages one VM in a thread of its own.

    :param report: called with every event; one call at a time
    :param ended: called last, from the thread
    """

    def __init__(
        self,
        vm: str,
        context: DaemonContext,
        report: Callable[[Event], None],
        ended: Callable[[VmWorker], None],
    ) -> None:
        self.vm, self.context = vm, context
        #: None until the worker has attached to the VM.
        self.session: Session | None = None
        self.failed = False
        #: Whether it failed because the host of the VM lacks a capability.
        self.lacks_capability = False
        #: When the current pass began, on the monotonic clock; None between two passes.
        self.pass_began_s: float | None = None
        self._report_event, self._ended = report, ended
        self._stop, self._wake = threading.Event(), threading.Event()
        self._paused = False
        self._thread = threading.Thread(target=self._run, name=f"reclaim-{vm}"[:15], daemon=True)

    def start(self) -> None:
        """Start the thread."""
        start_threads(self._thread)

    def wake(self) -> None:
        """Start the next pass at once."""
        self._wake.set()

    def stop(self) -> None:
        """Ask the thread to end; does not wait."""
        self._stop.set()
        self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread; return whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with Client(self.vm) as client:
                self._connect(client)
                if self.session is not None:
                    self._run_passes(self.session)
                    with contextlib.suppress(KvmHostError):
                        if not self.session.dry_run:
                            client.give_back_lease()
        except Exception as error:
            self._drop(f"{type(error).__name__}: {error}", failed=True)
            raise
        finally:
            # Frees the histories and masks of the VM.
            self.session = None
            self._ended(self)

    def _connect(self, client: Client) -> None:
        """Attach to the VM; with the option ``wait``, wait until it exists."""
        while not self._stop.is_set():
            try:
                self.session = Session(client, self.context)
                return None
            except VmGoneError as error:
                if not self.context.config.daemon.wait:
                    return self._drop(error.problem, failed=True)
            except ControlError as error:
                hint = "; use --take-over to replace it" if error.status == _LOCKED else ""
                self.lacks_capability = error.status == _LACKING
                return self._drop(f"{error}{hint}", failed=True)
            except KvmHostError as error:
                self.lacks_capability = isinstance(error, CapabilityError)
                return self._drop(str(error), failed=True)
            self._stop.wait(_RETRY_S)
        return None

    def _run_passes(self, session: Session) -> None:
        refusals = 0
        while not self._stop.is_set():
            start_s = self.pass_began_s = time.monotonic()
            pause_s = 0.0
            try:
                pause_s = self._one_pass(session)
                refusals = 0
            except GuestEnded:
                return self._drop("the guest has ended", failed=False)
            except VmGoneError as error:
                return self._drop(error.problem, failed=False)
            except CapabilityError as error:
                self.lacks_capability = True
                return self._drop(str(error), failed=True)
            except KvmHostError as error:
                refusals += 1
                locked = isinstance(error, ControlError) and error.status == _LOCKED
                if locked or refusals == _MAX_REFUSALS:
                    return self._drop(str(error), failed=True)
            self.pass_began_s = None
            last = self.context.config.daemon.passes
            if last and session.passes >= last:
                return None
            interval_s = session.interval_s
            took_s = time.monotonic() - start_s
            self._pause(session, max(interval_s - took_s, interval_s * _MIN_IDLE_SHARE, pause_s))
        return None

    def _pause(self, session: Session, seconds: float) -> None:
        """Wait for the time, a wake or a stop; renew the lease meanwhile."""
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            if self._wake.wait(min(left_s, session.lease_s / 3)):
                break
            if end_s > time.monotonic():
                # The next pass reports any error of the VM.
                with contextlib.suppress(KvmHostError):
                    session.renew_lease()
        if not self._stop.is_set():
            self._wake.clear()

    def _one_pass(self, session: Session) -> float:
        """Run a pass and report it; return the pause that the CPU limit requires, in s."""
        try:
            report = session.run_pass(self._stop)
        except VmPaused:
            if not self._paused:
                text = "the VM is paused: its pages do not age and none is evicted"
                self.context.decisions.add(
                    DecisionKind.SKIP, text, vm=self.vm, passes=session.passes
                )
            self._paused = True
            return 0.0
        self._paused = False
        self._report_event(report)
        return self.context.cpu.used(report.busy_ms / 1e3)

    def _drop(self, reason: str, failed: bool) -> None:
        self.failed = failed
        self.context.decisions.add(DecisionKind.DROP, reason, vm=self.vm)
        self._report_event(Dropped(self.vm, reason, failed))
