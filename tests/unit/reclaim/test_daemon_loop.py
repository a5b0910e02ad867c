"""The main loop of a daemon: reload, signals, watchdog and trigger."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import types

import pytest
from fake_vm import Events, FakeVm, N, config, make_daemon
from waiting import DEADLINE_S, until

from kvmhost.reclaim.account.events import Notice, PassReport
from kvmhost.reclaim.context import DaemonContext
from kvmhost.reclaim.daemon import Daemon
from kvmhost.reclaim.errors import ConfigError
from kvmhost.reclaim.host import Host
from kvmhost.units import Bytes, Mark, Seconds, Share


def test_a_reload_changes_what_it_can_and_says_what_it_cannot(vms):
    new = config(
        {"weight": 2.0} | {"budget": Mark(size=Bytes(400 * 4096)), "high": Mark(share=Share(1.0))},
        daemon={"vms": ["b"], "interval": Seconds(0.001), "name": "other", "passes": 0},
        limits={"pages_per_s": 7},
    )

    def then(event):
        if isinstance(event, PassReport) and event.number == 2 and event.vm == "a":
            daemon.reload()
        if isinstance(event, PassReport) and event.vm == "b" and event.number == 3:
            daemon.stop()

    events = Events(then)
    options = {"vms": ["a"], "interval": Seconds(0.001)}
    daemon = Daemon(DaemonContext.of(config(daemon=options)), events, reread=lambda: new)
    assert daemon.run()
    notice = events.of(Notice)[0]
    assert notice.text == "configuration reloaded; restart to change name"
    assert daemon.context.rate.per_s == 7
    assert vms["b"].limit == 400 * 4096
    assert vms["a"].given_back


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConfigError("x.toml", 3, "daemon.interval", "invalid time '5'"), "x.toml:3: daemon.inter"),
        (OSError(5, "Input/output error"), "OSError: [Errno 5]"),
        (OverflowError("int too large to convert to float"), "OverflowError: int too large"),
        (RecursionError("too deep"), "RecursionError: too deep"),
    ],
)
def test_a_reload_that_fails_leaves_everything_as_it_was(vms, error, text):
    def reread():
        raise error

    def then(event):
        if isinstance(event, PassReport) and event.number == 2:
            daemon.reload()
        if isinstance(event, Notice):
            daemon.stop()

    events = Events(then)
    options = {"vms": ["a"], "interval": Seconds(0.001)}
    daemon = Daemon(DaemonContext.of(config(daemon=options)), events, reread=reread)
    before = daemon.context.config
    assert daemon.run()
    assert events.of(Notice)[0].failed
    assert text in events.of(Notice)[0].text
    assert daemon.context.config is before


def test_a_pass_that_hangs_starves_the_watchdog(vms, monkeypatch):
    fed = []
    notifier = types.SimpleNamespace(
        watchdog_s=0.03,
        alive=lambda: fed.append(1),
        status=lambda text: None,
        ready=lambda text: None,
        stopping=lambda: None,
    )
    monkeypatch.setattr("kvmhost.reclaim.daemon._STUCK_S", 0.2)
    looks = []
    look = Daemon._notify_watchdog
    monkeypatch.setattr(
        Daemon, "_notify_watchdog", lambda self: (look(self), looks.append(time.monotonic()))
    )
    vms["a"] = vm = FakeVm("a")
    hang, inside = threading.Event(), threading.Event()

    def counters():
        if len(fed) >= 3:
            inside.set()
            hang.wait(DEADLINE_S)
        return FakeVm.counters(vm)

    vm.counters = counters
    options = {"vms": ["a"], "interval": Seconds(0.01)}
    daemon = Daemon(DaemonContext.of(config(daemon=options)), Events(), notifier=notifier)
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        assert inside.wait(DEADLINE_S)
        stuck_s = time.monotonic() + 0.2
        until(lambda: looks[-1] > stuck_s, "it looks at a pass that hangs")
        before, n = len(fed), len(looks)
        # A second look comes after the time between two notifications.
        until(lambda: looks[-1] > looks[n - 1] + 0.03, "it looks again")
        assert len(fed) == before, "a daemon that hangs is fed"
    finally:
        hang.set()
        daemon.stop()
        thread.join(DEADLINE_S)


def test_a_signal_in_the_main_thread_ends_it(vms):
    before = signal.signal(signal.SIGUSR1, lambda *_: daemon.stop())
    try:
        events = Events(lambda event: os.kill(os.getpid(), signal.SIGUSR1))
        daemon = make_daemon(["a"], events, interval=Seconds(1000))
        assert daemon.run()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_kernels_trigger_starts_a_pass_at_once(vms):
    """Urgent data on a socket is what a trigger looks like to poll."""
    vms["a"] = vm = FakeVm("a")
    vm.touches = lambda window: range(50)
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    with sender, receiver:
        # As in the kernel, an event is there until it is taken.
        trigger = types.SimpleNamespace(
            fd=receiver.fileno(),
            counts=lambda: receiver.recv(1, socket.MSG_OOB) == b"!",
            close=lambda: None,
        )
        pressure = {"psi_trigger": "some 1s in 2s", "trigger_step": Share(0.2)}
        whole = config(
            {
                "budget": Mark(size=Bytes(N * 4096)),
                "high": Mark(share=Share(1)),
                "low": Mark(share=Share(1)),
            },
            pressure=pressure,
            daemon={"vms": ["a"], "interval": Seconds(0.5)},
        )
        host = Host(whole.pressure, trigger=lambda text, path: trigger)

        def then(event):
            if event.number == 3:
                sender.send(b"!", socket.MSG_OOB)
            if event.outcomes.get("done"):
                daemon.stop()

        events = Events(then)
        daemon = Daemon(DaemonContext.of(whole, host), events)
        assert daemon.run()
    # A fifth of the resident pages. More passes may run before the stop takes effect.
    triggered = next(event for event in events if event.outcomes.get("done"))
    assert triggered.why == "trigger"
    assert triggered.evicted_pages == 200
