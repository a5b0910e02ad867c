"""Steps that Ctrl-C does not split: the signal arrives before or after, never in between."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["signals_deferred", "start_threads"]

_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Deliver SIGHUP, SIGINT and SIGTERM to the handlers of this process only after the body.

    For short bodies that would otherwise leave something behind: a folder that exists but
    that no variable names yet, or one that is half removed. Signals without a handler of
    Python keep their effect. Without effect in other threads, which handlers do not interrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    before = {number: signal.getsignal(number) for number in _ENDING}
    ours = [number for number, handler in before.items() if callable(handler)]
    try:
        for number in ours:
            signal.signal(number, note)
        yield
    finally:
        # A signal during one step ends none of the others.
        with contextlib.ExitStack() as stack:
            stack.callback(_deliver, waiting)
            for number in ours:
                stack.callback(signal.signal, number, before[number])


def _deliver(numbers: list[int]) -> None:
    for number in numbers:
        signal.raise_signal(number)


def start_threads(*threads: threading.Thread) -> None:
    """Start threads, all of them; Ctrl-C during this is raised afterwards.

    ``Thread.start()`` alone may raise it when the thread already runs: an owner that does not
    know of the thread yet never ends it.
    """
    with signals_deferred():
        for thread in threads:
            thread.start()
