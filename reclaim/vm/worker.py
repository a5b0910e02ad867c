"""The thread that looks after one VM: meet it, pass after pass, and let it go."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from kvmhost.control.client import Client
from kvmhost.errors import ControlError, KvmHostError, VmGoneError
from kvmhost.reclaim.account.decisions import Kind
from kvmhost.reclaim.account.events import Dropped, Event
from kvmhost.reclaim.context import Common
from kvmhost.reclaim.vm.session import Ended, Session, Standing

__all__ = ["Member"]

#: Refusals in a row after which a VM is given up.
_MAX_REFUSALS = 5
#: A pass that takes longer than the interval is followed by this share of it at least.
_MIN_IDLE_SHARE = 0.1
#: How often a VM that is not there yet is looked for.
_LOOK_S = 0.1
#: Not Implemented: the VM has no pager, and will not get one. Locked: it has another daemon.
_NOT_THERE, _LOCKED = 501, 423


class Member:
    """One VM of a daemon, with a thread of its own.

    :param tell: called with every event; one call at a time
    :param ended: called last, from the thread
    """

    def __init__(
        self,
        vm: str,
        common: Common,
        tell: Callable[[Event], None],
        ended: Callable[[Member], None],
    ) -> None:
        self.vm, self.common = vm, common
        #: None until the VM has been met.
        self.session: Session | None = None
        self.failed = False
        #: When the pass in work began, on the monotonic clock; None between two passes.
        self.working_since_s: float | None = None
        self._tell, self._ended = tell, ended
        self._stop, self._wake = threading.Event(), threading.Event()
        self._standing = False
        self._thread = threading.Thread(
            target=self._look_after, name=f"reclaim-{vm}"[:15], daemon=True
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Have the next pass begin at once."""
        self._wake.set()

    def stop(self) -> None:
        """Ask the thread to end; does not wait."""
        self._stop.set()
        self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; return whether it came."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _look_after(self) -> None:
        try:
            with Client(self.vm) as client:
                self._meet(client)
                if self.session is not None:
                    self._run_passes(self.session)
                    with contextlib.suppress(KvmHostError):
                        if not self.session.dry_run:
                            client.give_back_lease()
        except Exception as error:
            self._drop(f"{type(error).__name__}: {error}", failed=True)
            raise
        finally:
            # Histories and masks go with the session; only a name is left of the VM.
            self.session = None
            self._ended(self)

    def _meet(self, client: Client) -> None:
        """Wait for the VM, if that is asked, and begin to look after it."""
        while not self._stop.is_set():
            try:
                self.session = Session(client, self.common)
                return None
            except VmGoneError as error:
                if not self.common.config.daemon.wait:
                    return self._drop(error.problem, failed=True)
            except ControlError as error:
                hint = "; --take-over takes it away" if error.status == _LOCKED else ""
                return self._drop(f"{error}{hint}", failed=True)
            except KvmHostError as error:
                return self._drop(str(error), failed=True)
            self._stop.wait(_LOOK_S)
        return None

    def _run_passes(self, session: Session) -> None:
        refusals = 0
        while not self._stop.is_set():
            start_s = self.working_since_s = time.monotonic()
            rest_s = 0.0
            try:
                rest_s = self._one_pass(session)
                refusals = 0
            except Ended:
                return self._drop("the guest has ended", failed=False)
            except VmGoneError as error:
                return self._drop(error.problem, failed=False)
            except ControlError as error:
                refusals += 1
                if error.status in (_NOT_THERE, _LOCKED) or refusals == _MAX_REFUSALS:
                    return self._drop(str(error), failed=True)
            self.working_since_s = None
            last = self.common.config.daemon.passes
            if last and session.passes >= last:
                return None
            interval_s = self.common.config.daemon.interval
            took_s = time.monotonic() - start_s
            self._rest(session, max(interval_s - took_s, interval_s * _MIN_IDLE_SHARE, rest_s))
        return None

    def _rest(self, session: Session, seconds: float) -> None:
        """Wait for the time, a wake or the stop; in a long rest tell the VM that all is well."""
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            if self._wake.wait(min(left_s, session.lease_s / 3)):
                break
            if end_s > time.monotonic():
                # What is wrong with the VM, the next pass will meet too.
                with contextlib.suppress(KvmHostError):
                    session.stay()
        if not self._stop.is_set():
            self._wake.clear()

    def _one_pass(self, session: Session) -> float:
        """Make a pass and tell it; return for how long the limit on the CPU wants a rest."""
        try:
            report = session.run_pass(self._stop)
        except Standing:
            if not self._standing:
                text = "the VM is paused: nothing ages and nothing goes"
                self.common.decisions.add(Kind.SKIP, text, vm=self.vm, passes=session.passes)
            self._standing = True
            return 0.0
        self._standing = False
        self._tell(report)
        return self.common.cpu.used(report.busy_ms / 1e3)

    def _drop(self, reason: str, failed: bool) -> None:
        self.failed = failed
        self.common.decisions.add(Kind.DROP, reason, vm=self.vm)
        self._tell(Dropped(self.vm, reason, failed))
