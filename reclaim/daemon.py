"""The reclaim daemon: the set of managed VMs, and the main loop.

One thread per VM runs the passes (:mod:`kvmhost.reclaim.vm.session`). The main thread
finds the VMs that the options name, measures the pressure that they share, reloads the
options on demand, and notifies the watchdog as long as no pass hangs.

The daemon holds no guest data. Evicted pages and the fault handler belong to the VM,
which keeps the limit and the victims of the last pass if the daemon ends or is killed;
the next daemon starts with every page in one generation.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable

import msgspec

from kvmhost.control.paths import running_names
from kvmhost.errors import KvmHostError
from kvmhost.reclaim.account.decisions import DecisionKind
from kvmhost.reclaim.account.events import Event, Notice
from kvmhost.reclaim.context import DaemonContext, cpu_limit, rate_limit
from kvmhost.reclaim.errors import ReclaimError
from kvmhost.reclaim.host import Host
from kvmhost.reclaim.sdnotify import SdNotifier
from kvmhost.reclaim.settings.options import Config
from kvmhost.reclaim.vm.session import Session
from kvmhost.reclaim.vm.worker import VmWorker
from kvmhost.timescale import scaled

__all__ = ["Daemon", "is_pattern"]

#: Time that running requests may take after a stop.
_STOP_S = scaled(5.0)
#: A pass is considered hung after this time; the client's own timeout is a minute.
_STUCK_S = scaled(150.0)
_MAX_TICK_S = 1.0
#: Time before a pattern picks up the name of a VM that ended, or that failed, again.
_IGNORE_ENDED_S, _IGNORE_FAILED_S = 2.0, 30.0

log = logging.getLogger("reclaim")


def is_pattern(name: str) -> bool:
    """Return whether a VM name is a pattern."""
    return "/" not in name and any(char in name for char in "*?[")


class Daemon:
    """Manages several VMs until it is stopped or all of them have ended.

    :param report: called with every event, one call at a time
    :param reread: reads the options again, for a reload; None if there is no file
    :param notifier: connection to the service manager
    """

    def __init__(
        self,
        context: DaemonContext,
        report: Callable[[Event], None],
        *,
        reread: Callable[[], Config] | None = None,
        notifier: SdNotifier | None = None,
    ) -> None:
        self.context = context
        self._report, self._reread = report, reread
        self._notifier = notifier or SdNotifier({})
        self._lock, self._report_lock = threading.Lock(), threading.Lock()
        self._workers: dict[str, VmWorker] = {}
        #: VMs that ended or failed recently, and until when patterns ignore them.
        self._ignored_until: dict[str, float] = {}
        self._failed = self._stopping = self._reload_asked = False
        #: Whether each failure so far was that a VM's host lacks a capability.
        self.lacks_capability = True
        self._notified_s = 0.0
        self._woken, self._wake = os.pipe()
        for end in (self._woken, self._wake):
            # Neither a closed reader nor a full pipe may block the writer.
            os.set_blocking(end, False)

    def run(self) -> bool:
        """Run until the end, once; False if a VM was dropped because of a failure."""
        try:
            self._find_vms(first=True)
            self._notifier.ready(self._status())
            while not self._stopping and (self._workers or self._waits_for_more()):
                self._sleep()
                if self._reload_asked:
                    self._reload_asked = False
                    self._reload()
                self._find_vms()
                self._notify_watchdog()
            self._notifier.stopping()
        finally:
            self._stop_workers()
        return not self._failed

    def stop(self) -> None:
        """Request the end; does not wait. Safe in a signal handler."""
        self._stopping = True
        self._poke()

    def reload(self) -> None:
        """Request a reload of the options; does not wait. Safe in a signal handler."""
        self._reload_asked = True
        self._poke()

    def sessions(self) -> list[Session]:
        """Return the sessions of the managed VMs, sorted by name."""
        with self._lock:
            found = [worker.session for worker in self._workers.values()]
        return sorted((s for s in found if s is not None), key=lambda s: s.vm)

    # -- workers --------------------------------------------------------------

    def _find_vms(self, first: bool = False) -> None:
        """Start workers for new VMs.

        A VM given by name that ended is not picked up again; a VM that matches a
        pattern is, under the same name.
        """
        wanted = self.context.config.daemon.vms
        names = [name for name in wanted if first and not is_pattern(name)]
        if any(is_pattern(name) for name in wanted):
            names += [name for name in self._running() if self._matches(name)]
        now_s = time.monotonic()
        with self._lock:
            self._ignored_until = {
                n: until for n, until in self._ignored_until.items() if until > now_s
            }
            if not first:
                names = [name for name in names if name not in self._ignored_until]
            new = [name for name in dict.fromkeys(names) if name not in self._workers]
            for name in new:
                self._workers[name] = VmWorker(name, self.context, self._report_event, self._ended)
            workers = [self._workers[name] for name in new]
        for worker in workers:
            worker.start()

    def _running(self) -> list[str]:
        try:
            return running_names()
        except (KvmHostError, OSError) as error:
            log.warning("cannot list running VMs: %s", error)
            return []

    def _matches(self, name: str) -> bool:
        import fnmatch

        patterns = [p for p in self.context.config.daemon.vms if is_pattern(p)]
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    def _waits_for_more(self) -> bool:
        return any(is_pattern(name) for name in self.context.config.daemon.vms)

    def _ended(self, worker: VmWorker) -> None:
        """Free all state of a VM. Called last, from the VM's thread."""
        self.context.host.forget(worker.vm)
        self.context.decisions.forget(worker.vm)
        with self._lock:
            self._failed = self._failed or worker.failed
            if worker.failed:
                self.lacks_capability &= worker.lacks_capability
            ignore_s = _IGNORE_FAILED_S if worker.failed else _IGNORE_ENDED_S
            self._ignored_until[worker.vm] = time.monotonic() + ignore_s
            if self._workers.get(worker.vm) is worker:
                del self._workers[worker.vm]
            self._poke()

    def _report_event(self, event: Event) -> None:
        with self._report_lock:
            self._report(event)

    # -- the loop -------------------------------------------------------------

    def _sleep(self) -> None:
        """Wait for a tick, a request, or the kernel's trigger; update the pressure."""
        host = self.context.host
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if host.trigger is not None:
            poll.register(host.trigger.fd, select.POLLPRI)
        tick_s = min(self.context.config.daemon.interval, _MAX_TICK_S)
        events = dict(poll.poll(tick_s * 1e3))
        if self._woken in events:
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 4096)
        trigger_events = events.get(host.trigger.fd, 0) if host.trigger is not None else 0
        if trigger_events & (select.POLLERR | select.POLLNVAL):
            log.warning("the pressure trigger was removed with its cgroup")
            host.close()
        fired = bool(trigger_events & select.POLLPRI) and host.trigger_counts()
        host.update(fired)
        if fired:
            with self._lock:
                workers = list(self._workers.values())
            for worker in workers:
                worker.wake()

    def _notify_watchdog(self) -> None:
        """Notify the watchdog, unless a pass hangs for longer than any request may take."""
        now_s = time.monotonic()
        if (
            not self._notifier.watchdog_s
            or now_s - self._notified_s < self._notifier.watchdog_s / 3
        ):
            return
        with self._lock:
            since = [w.pass_began_s for w in self._workers.values()]
        if all(s is None or now_s - s < _STUCK_S for s in since):
            self._notifier.alive()
            self._notifier.status(self._status())
            self._notified_s = now_s

    def _status(self) -> str:
        with self._lock:
            n = len(self._workers)
        return f"managing {n} VM{'' if n == 1 else 's'}"

    def _poke(self) -> None:
        if self._wake >= 0:
            # Not a threading.Event: setting one in a signal handler may deadlock.
            with contextlib.suppress(BlockingIOError):
                os.write(self._wake, b"x")

    # -- reload ---------------------------------------------------------------

    def _reload(self) -> None:
        """Reload the options; invalid options change nothing."""
        self._notifier.reloading()
        try:
            if self._reread is None:
                raise ReclaimError("reclaimd was started without a configuration file")
            text = self._apply(self._reread())
            notice = Notice(text)
        except KvmHostError as error:
            notice = Notice(f"not reloaded: {error}", failed=True)
        # A file that somebody edits must not end a daemon that runs: whatever else goes
        # wrong, plug-ins included, leaves the options as they are.
        except Exception as error:  # noqa: BLE001
            notice = Notice(f"not reloaded: {type(error).__name__}: {error}", failed=True)
        self.context.decisions.add(DecisionKind.RELOAD, notice.text)
        self._report_event(notice)
        self._notifier.ready(self._status())

    def _apply(self, config: Config) -> str:
        """Apply the options that can change at run time; return a text that names the others."""
        old = self.context.config
        kept = {name: getattr(old.daemon, name) for name in _FIXED}
        fixed = [name for name in _FIXED if getattr(config.daemon, name) != kept[name]]
        if config.account != old.account:
            fixed.append("[account]")
        config = msgspec.structs.replace(
            config,
            daemon=msgspec.structs.replace(config.daemon, **kept),
            account=old.account,
        )
        if config.pressure != old.pressure:
            # Open the new one first: if its files cannot be opened, the old one stays.
            before, self.context.host = self.context.host, Host(config.pressure)
            before.close()
        if config.limits != old.limits:
            self.context.rate, self.context.cpu = (
                rate_limit(config.limits),
                cpu_limit(config.limits),
            )
        self.context.config = config
        self._change_workers(config)
        text = "configuration reloaded"
        return f"{text}; restart to change {', '.join(fixed)}" if fixed else text

    def _change_workers(self, config: Config) -> None:
        """Stop the workers of VMs that are no longer named, start those of new ones."""
        named = {name for name in config.daemon.vms if not is_pattern(name)}
        with self._lock:
            leaving = [
                w for n, w in self._workers.items() if n not in named and not self._matches(n)
            ]
        for worker in leaving:
            worker.stop()
        self._find_vms(first=True)

    def _stop_workers(self) -> None:
        with self._lock:
            workers = list(self._workers.values())
        for worker in workers:
            worker.stop()
        deadline_s = time.monotonic() + _STOP_S
        for worker in workers:
            worker.join(max(0.0, deadline_s - time.monotonic()))
        with self._lock:
            # A signal handler may call _poke() concurrently.
            ends, self._wake = (self._woken, self._wake), -1
            for end in ends:
                os.close(end)


#: Options of [daemon] that only a restart changes.
_FIXED = ("name", "dry_run", "passes", "json", "log_file", "metrics_port")
