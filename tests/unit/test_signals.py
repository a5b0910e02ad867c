"""Signals during short steps arrive after them; threads are known to their owners."""

from __future__ import annotations

import signal
import threading

import pytest

from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.signals import signals_deferred, start_threads


def test_signals_are_delivered_after_the_body_and_the_handlers_are_back() -> None:
    before, steps = signal.getsignal(signal.SIGINT), list[str]()

    def step() -> None:
        signal.raise_signal(signal.SIGINT)
        steps.append("after the signal")

    with pytest.raises(KeyboardInterrupt), signals_deferred():
        step()
    assert steps == ["after the signal"]
    assert signal.getsignal(signal.SIGINT) == before


def interrupt_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C arrive in each Thread.start(), when the thread already runs."""
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        real(thread)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(threading.Thread, "start", start)


def test_all_threads_start(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    threads = [threading.Thread(target=go.wait) for _ in range(3)]
    with monkeypatch.context() as patch:
        interrupt_starts(patch)
        with pytest.raises(KeyboardInterrupt):
            start_threads(*threads)
    assert all(thread.is_alive() for thread in threads)
    go.set()
    for thread in threads:
        thread.join()


@pytest.mark.requires_uffd
def test_interrupted_pager_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    with Machine(image_path("hello"), mem_bytes=4 << 20, engine="emulated") as machine:
        with monkeypatch.context() as patch:
            interrupt_starts(patch)
            with pytest.raises(KeyboardInterrupt):
                machine.evict(range(0x300, 0x310))
        assert len(set(threading.enumerate()) - before) == 2
    assert set(threading.enumerate()) == before
