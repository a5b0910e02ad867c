"""Temporary folders that Ctrl-C does not leave behind, whenever it is pressed."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

__all__ = ["signals_deferred", "temporary_folder"]

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


@contextlib.contextmanager
def temporary_folder(prefix: str, beside: Path | None = None) -> Iterator[Path]:
    """Make a folder of mode 0700, and remove it with its contents after the body.

    :param prefix: first part of its name
    :param beside: the folder to make it in; None: ``TMPDIR``
    :raises OSError: if it cannot be made
    """
    folder = None
    try:
        with signals_deferred():
            folder = tempfile.TemporaryDirectory(prefix=prefix, dir=beside)
        yield Path(folder.name)
    finally:
        with signals_deferred():
            if folder is not None:
                folder.cleanup()
