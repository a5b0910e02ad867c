"""The reclaim daemon: who is looked after, and the loop that everything hangs on.

One thread a VM makes the passes (:mod:`kvmhost.reclaim.vm.session`). The main thread finds VMs of
the names that are asked for, looks at the pressure that all of them share, reads its
options again on demand, and feeds the watchdog as long as no pass hangs.

The daemon holds only opinions. All data and all faults are the VM's, which keeps
limit and victims of the last pass when the daemon goes, in whatever way; the next
daemon begins with every page in one generation.
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
from kvmhost.reclaim.account.decisions import Kind
from kvmhost.reclaim.account.events import Event, Notice
from kvmhost.reclaim.context import Common, cpu_limit, rate_limit
from kvmhost.reclaim.control.sdnotify import Notifier
from kvmhost.reclaim.errors import ReclaimError
from kvmhost.reclaim.pressure.host import Host
from kvmhost.reclaim.settings.options import Config
from kvmhost.reclaim.vm.session import Session
from kvmhost.reclaim.vm.worker import Member

__all__ = ["Daemon", "is_pattern"]

#: How long requests in work may take after a stop.
_STOP_S = 5.0
#: A pass in which a VM does not answer ends after a minute, the client's own timeout.
_STUCK_S = 150.0
_MAX_TICK_S = 1.0
#: A VM whose guest ended holds its name a little longer; one that refused may change its mind.
_SHUN_ENDED_S, _SHUN_FAILED_S = 2.0, 30.0

log = logging.getLogger("reclaim")


def is_pattern(name: str) -> bool:
    """Return whether a name of a VM stands for any number of them."""
    return "/" not in name and any(char in name for char in "*?[")


class Daemon:
    """Looks after several VMs until it is stopped or they are gone.

    :param report: called with every event, one call at a time
    :param reread: returns the options anew, for a reload; None: there is nothing to read
    :param notifier: what tells the service manager
    """

    def __init__(
        self,
        common: Common,
        report: Callable[[Event], None],
        *,
        reread: Callable[[], Config] | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        self.common = common
        self._report, self._reread = report, reread
        self._notifier = notifier or Notifier({})
        self._lock, self._telling = threading.Lock(), threading.Lock()
        self._members: dict[str, Member] = {}
        #: VMs that ended or failed just now, and until when patterns pass them over.
        self._shunned: dict[str, float] = {}
        self._failed = self._stopping = self._reload_asked = False
        self._fed_s = 0.0
        self._woken, self._wake = os.pipe()
        for end in (self._woken, self._wake):
            # A reader that is gone, or a full pipe, must hold nobody up.
            os.set_blocking(end, False)

    def run(self) -> bool:
        """Run to the end, once; False if a VM was dropped because something failed."""
        try:
            self._find_vms(first=True)
            self._notifier.ready(self._status())
            while not self._stopping and (self._members or self._waits_for_more()):
                self._sleep()
                if self._reload_asked:
                    self._reload_asked = False
                    self._reload()
                self._find_vms()
                self._feed()
            self._notifier.stopping()
        finally:
            self._let_go()
        return not self._failed

    def stop(self) -> None:
        """Ask it to end; does not wait. Safe in a signal handler."""
        self._stopping = True
        self._poke()

    def reload(self) -> None:
        """Ask it to read its options again; does not wait. Safe in a signal handler."""
        self._reload_asked = True
        self._poke()

    def sessions(self) -> list[Session]:
        """Return the VMs that are looked after now, by name."""
        with self._lock:
            found = [member.session for member in self._members.values()]
        return sorted((s for s in found if s is not None), key=lambda s: s.vm)

    # -- members --------------------------------------------------------------

    def _find_vms(self, first: bool = False) -> None:
        """Begin with VMs that have come, and end with those that are no longer asked for.

        A VM that was named and is gone is not looked for again; one that a pattern
        found is, under the same name.
        """
        wanted = self.common.config.daemon.vms
        names = [name for name in wanted if first and not is_pattern(name)]
        if any(is_pattern(name) for name in wanted):
            names += [name for name in self._running() if self._matches(name)]
        now_s = time.monotonic()
        with self._lock:
            self._shunned = {n: until for n, until in self._shunned.items() if until > now_s}
            if not first:
                names = [name for name in names if name not in self._shunned]
            new = [name for name in dict.fromkeys(names) if name not in self._members]
            for name in new:
                self._members[name] = Member(name, self.common, self._tell, self._ended)
            members = [self._members[name] for name in new]
        for member in members:
            member.start()

    def _running(self) -> list[str]:
        try:
            return running_names()
        except (KvmHostError, OSError) as error:
            log.warning("cannot look for VMs: %s", error)
            return []

    def _matches(self, name: str) -> bool:
        import fnmatch

        patterns = [p for p in self.common.config.daemon.vms if is_pattern(p)]
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    def _waits_for_more(self) -> bool:
        return any(is_pattern(name) for name in self.common.config.daemon.vms)

    def _ended(self, member: Member) -> None:
        """Free everything about a VM; from its thread, the last thing that it does."""
        self.common.host.forget(member.vm)
        self.common.decisions.forget(member.vm)
        with self._lock:
            self._failed = self._failed or member.failed
            shun_s = _SHUN_FAILED_S if member.failed else _SHUN_ENDED_S
            self._shunned[member.vm] = time.monotonic() + shun_s
            if self._members.get(member.vm) is member:
                del self._members[member.vm]
            self._poke()

    def _tell(self, event: Event) -> None:
        with self._telling:
            self._report(event)

    # -- the loop -------------------------------------------------------------

    def _sleep(self) -> None:
        """Wait for a tick, a wish, or the kernel's trigger; look at the pressure."""
        host = self.common.host
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if host.trigger is not None:
            poll.register(host.trigger.fd, select.POLLPRI)
        tick_s = min(self.common.config.daemon.interval, _MAX_TICK_S)
        events = dict(poll.poll(tick_s * 1e3))
        if self._woken in events:
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 4096)
        what = events.get(host.trigger.fd, 0) if host.trigger is not None else 0
        if what & (select.POLLERR | select.POLLNVAL):
            log.warning("the pressure trigger is gone, with its cgroup")
            host.close()
        fired = bool(what & select.POLLPRI)
        host.look(fired)
        if fired:
            with self._lock:
                members = list(self._members.values())
            for member in members:
                member.wake()

    def _feed(self) -> None:
        """Feed the watchdog, unless a pass hangs for longer than any request may take."""
        now_s = time.monotonic()
        if not self._notifier.watchdog_s or now_s - self._fed_s < self._notifier.watchdog_s / 3:
            return
        with self._lock:
            since = [m.working_since_s for m in self._members.values()]
        if all(s is None or now_s - s < _STUCK_S for s in since):
            self._notifier.alive()
            self._notifier.status(self._status())
            self._fed_s = now_s

    def _status(self) -> str:
        with self._lock:
            n = len(self._members)
        return f"looking after {n} VM{'' if n == 1 else 's'}"

    def _poke(self) -> None:
        if self._wake >= 0:
            # An event would do, but setting one in a signal handler may deadlock.
            with contextlib.suppress(BlockingIOError):
                os.write(self._wake, b"x")

    # -- reload ---------------------------------------------------------------

    def _reload(self) -> None:
        """Read the options again; what is wrong with them leaves everything as it was."""
        self._notifier.reloading()
        try:
            if self._reread is None:
                raise ReclaimError("there is no configuration file to read")
            text = self._take(self._reread())
            notice = Notice(text)
        except (ReclaimError, KvmHostError) as error:
            notice = Notice(f"not reloaded: {error}", failed=True)
        self.common.decisions.add(Kind.RELOAD, notice.text)
        self._tell(notice)
        self._notifier.ready(self._status())

    def _take(self, config: Config) -> str:
        """Replace what can be replaced at run time; say what cannot."""
        old = self.common.config
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
            # The new one first: if its files cannot be opened, the old one goes on.
            before, self.common.host = self.common.host, Host(config.pressure)
            before.close()
        if config.limits != old.limits:
            self.common.rate, self.common.cpu = rate_limit(config.limits), cpu_limit(config.limits)
        self.common.config = config
        self._change_members(config)
        text = "configuration read again"
        return f"{text}; only a restart changes {', '.join(fixed)}" if fixed else text

    def _change_members(self, config: Config) -> None:
        """Stop with VMs that are no longer named, begin with those that now are."""
        named = {name for name in config.daemon.vms if not is_pattern(name)}
        with self._lock:
            leave = [m for n, m in self._members.items() if n not in named and not self._matches(n)]
        for member in leave:
            member.stop()
        self._find_vms(first=True)

    def _let_go(self) -> None:
        with self._lock:
            members = list(self._members.values())
        for member in members:
            member.stop()
        deadline_s = time.monotonic() + _STOP_S
        for member in members:
            member.join(max(0.0, deadline_s - time.monotonic()))
        with self._lock:
            # A signal's handler may want to poke in between.
            ends, self._wake = (self._woken, self._wake), -1
            for end in ends:
                os.close(end)


#: Options of [daemon] that hold until the daemon ends.
_FIXED = ("name", "dry_run", "passes", "json", "metrics_port")
