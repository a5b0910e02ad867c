"""Standard output and error of a command that must end even if they are not read.

A write to a full pipe or terminal blocks until the reader reads. ``kvmhost run`` must
still honour ``--timeout`` and signals. Therefore a separate thread writes, and the
printing thread waits for it for at most one second.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import queue
import signal
import sys
import threading
import typing
from collections.abc import Iterator

from kvmhost.timescale import scaled

__all__ = ["DEADLINE_S", "DeadlineFile", "deadline_stderr"]

#: Deadline of a write in seconds.
DEADLINE_S = scaled(1.0)


class DeadlineFile(io.FileIO):
    """A descriptor whose writes have a deadline; it is not closed with the object.

    A write that misses the deadline continues in its thread; until it completes, further
    writes fail immediately.

    :param deadline_s: deadline of a write; None: no deadline
    :param drop: discard data that cannot be written, instead of raising ``TimeoutError``
    """

    def __init__(self, fd: int, deadline_s: float | None = DEADLINE_S, drop: bool = False) -> None:
        super().__init__(fd, "w", closefd=False)
        self._deadline_s, self._drop = deadline_s, drop
        self._asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._late = False

    def write(self, data: typing.Any) -> int:
        """Write all data, or raise the error of the descriptor or of the deadline."""
        if self._deadline_s is None:
            return super().write(data) or 0
        whole = bytes(data)
        try:
            failure = self._write(whole)
        except queue.Empty:
            failure = TimeoutError(errno.ETIMEDOUT, "its reader does not read")
        if failure is not None and not self._drop:
            raise failure
        return len(whole)

    def _write(self, data: bytes) -> OSError | None:
        if self._late:
            self._done.get_nowait()
        if self._thread is None:
            self._start()
        # Set it first: if a signal interrupts the wait below, the result is still pending.
        self._late = True
        self._asked.put(data)
        failure = self._done.get(timeout=self._deadline_s)
        self._late = False
        return failure

    def _start(self) -> None:
        # A daemon thread: the interpreter does not wait for it at exit. All signals are
        # blocked in it, so that the main thread handles them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._thread = threading.Thread(target=self._serve, name="output", daemon=True)
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _serve(self) -> None:
        while True:
            left, failure = memoryview(self._asked.get()), None
            while left and failure is None:
                try:
                    left = left[os.write(self.fileno(), left) :]
                except OSError as error:
                    failure = error
            self._done.put(failure)


@contextlib.contextmanager
def deadline_stderr() -> Iterator[None]:
    """Drop messages to the standard error of this process if they are not read."""
    before = sys.stderr
    if not isinstance(before, io.TextIOWrapper) or before is not sys.__stderr__:
        yield
        return
    raw = DeadlineFile(before.fileno(), drop=True)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(raw), before.encoding, "backslashreplace", line_buffering=True
    )
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = before
