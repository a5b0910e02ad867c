"""Rate-limited logging of events that clients cause."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

__all__ = ["RateLimitedLog"]

#: Lines of one kind per window; further ones are only counted.
BURST, WINDOW_S = 5, 10.0


class RateLimitedLog:
    """Logs a few lines of each kind per window, and the number of suppressed ones.

    The number is logged with the first line of the next window, or by :meth:`flush`.
    """

    def __init__(
        self,
        log: logging.Logger,
        *,
        burst: int = BURST,
        window_s: float = WINDOW_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._burst, self._window_s, self._clock = log, burst, window_s, clock
        #: By kind: when its window began, lines written in it, lines left out.
        self._kinds: dict[str, tuple[float, int, int]] = {}

    def write(self, level: int, kind: str, text: str, *args: Any, **how: Any) -> None:
        """Write a line, or count it.

        :param kind: which lines are counted together; from a short fixed list
        """
        now = self._clock()
        since, written, left_out = self._kinds.get(kind, (now, 0, 0))
        if now - since >= self._window_s:
            self._report(kind, left_out)
            since, written, left_out = now, 0, 0
        if written < self._burst:
            self._log.log(level, text, *args, **how)
            written += 1
        else:
            left_out += 1
        self._kinds[kind] = since, written, left_out

    def exception(self, kind: str, text: str, *args: Any) -> None:
        """Write a line with the exception that is being handled, or count it."""
        self.write(logging.ERROR, kind, text, *args, exc_info=True)

    def flush(self) -> None:
        """Log the number of lines suppressed so far."""
        for kind, (_, _, left_out) in self._kinds.items():
            self._report(kind, left_out)
        self._kinds.clear()

    def _report(self, kind: str, left_out: int) -> None:
        if left_out:
            self._log.warning("%s: %d more lines like these were left out", kind, left_out)
