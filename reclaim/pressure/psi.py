"""Pressure stall information: the time that tasks waited for memory, and triggers on it.

``/proc/pressure/memory`` and the ``memory.pressure`` of a version 2 cgroup have two
lines. *some*: at least one task stalled; *full*: all tasks stalled. Their totals only
grow, so a meter takes two readings and divides by the time between them. The result is
exact over the meter's window, while the kernel's averages decay over fixed windows.

A trigger is written into the file and polled: the kernel reports POLLPRI when the
stall in a window reaches the threshold, at most once per window. Closing the descriptor
removes the trigger. Its string must end in a newline or NUL, and without CAP_SYS_RESOURCE
the window must be a multiple of 2 s.

The first event after arming can be caused by stall before arming: the kernel's window
begins with a total that is updated only while a trigger exists. Therefore the total is
read at arming, and an event counts only once the total has grown by the threshold since.

Source: Documentation/accounting/psi.rst, Linux v6.12.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import select
import time
from collections.abc import Callable

from kvmhost.closing import Closing
from kvmhost.reclaim.errors import KernelFileError
from kvmhost.reclaim.pressure.kernelfiles import KernelFiles
from kvmhost.units import Seconds

__all__ = ["SYSTEM_PSI", "Psi", "PsiMeter", "PsiTrigger", "parse_psi", "parse_trigger"]

SYSTEM_PSI = "/proc/pressure/memory"

_LINE = re.compile(r"(some|full) avg10=(\d+\.\d+) avg60=(\d+\.\d+) avg300=(\d+\.\d+) total=(\d+)")
_TRIGGER = re.compile(r"(some|full)\s+(\S+)\s+in\s+(\S+)")


@dataclasses.dataclass(frozen=True)
class Psi:
    """One reading: microseconds stalled since boot."""

    some_us: int
    full_us: int


def parse_psi(text: str, path: str = SYSTEM_PSI) -> Psi:
    """Read the text of a pressure file.

    :raises KernelFileError: ``EPROTO`` if it is not the text of a pressure file
    """
    totals = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line.strip())
        if match:
            totals[match[1]] = int(match[5])
    if "some" not in totals:
        raise KernelFileError(path, errno.EPROTO)
    # Before Linux 5.13 the file "cpu" had no line "full"; "memory" always had one.
    return Psi(totals["some"], totals.get("full", 0))


class PsiMeter:
    """The share of time that tasks stalled between two calls.

    :param clock: a monotonic clock in seconds
    """

    def __init__(
        self,
        path: str = SYSTEM_PSI,
        files: KernelFiles | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self._files, self._clock = files or KernelFiles(), clock
        self._last = self._read(), clock()

    def share(self) -> float:
        """Return the share of *some* since the previous call, 0 to 1.

        :raises KernelFileError: if the file cannot be read, or is not a pressure file
        """
        (before, then_s), now_s = self._last, self._clock()
        self._last = now, _ = self._read(), now_s
        took_s = now_s - then_s
        if took_s <= 0:
            return 0.0
        # The total of a cgroup that was removed and created again starts at 0.
        stalled_us = max(0, now.some_us - before.some_us)
        return min(1.0, stalled_us / 1e6 / took_s)

    def _read(self) -> Psi:
        return parse_psi(self._files.read(self.path), self.path)


def parse_trigger(text: str) -> tuple[str, int, int]:
    """Parse ``some 150ms in 2s`` as (kind, stall in us, window in us).

    :raises ValueError: if the syntax is invalid, or the kernel would refuse the trigger
    """
    match = _TRIGGER.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no trigger; write for example 'some 150ms in 2s'")
    stall, window = (round(Seconds.parse(match[i]) * 1e6) for i in (2, 3))
    # WINDOW_MIN_US and WINDOW_MAX_US, Linux v6.12, kernel/sched/psi.c.
    if not 500_000 <= window <= 10_000_000 or not 0 < stall <= window:
        raise ValueError(f"{text!r}: need a window of 500ms to 10s and a stall of part of it")
    return match[1], stall, window


class PsiTrigger(Closing):
    """A trigger; its descriptor becomes urgent (POLLPRI) each time it fires.

    :param text: in the syntax of :func:`parse_trigger`
    :raises KernelFileError: if the kernel refuses it
    :raises ValueError: if the syntax is invalid
    """

    def __init__(self, text: str, path: str = SYSTEM_PSI) -> None:
        kind, stall_us, window_us = parse_trigger(text)
        value = f"{kind} {stall_us} {window_us}\n"
        self.path = path
        self.fd = -1
        self._kind, self._stall_us = kind, stall_us
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            #: Total at arming; None once the stall since arming has reached the threshold.
            self._armed_us: int | None = self._total_us()
            os.write(self.fd, value.encode())
        except OSError as error:
            self.close()
            raise KernelFileError(path, error.errno or 0, value) from error

    def fired(self, timeout_s: float = 0.0) -> bool:
        """Wait until the trigger fires or the timeout expires.

        An event caused by stall before arming is consumed and ignored.

        :raises KernelFileError: ``ENODEV`` if its cgroup was removed
        """
        poll = select.poll()
        poll.register(self.fd, select.POLLPRI)
        events = poll.poll(timeout_s * 1e3)
        if any(event & (select.POLLERR | select.POLLNVAL) for _, event in events):
            raise KernelFileError(self.path, errno.ENODEV)
        return bool(events) and self.counts()

    def counts(self) -> bool:
        """Return whether a polled event was caused by stall since arming.

        :raises KernelFileError: if the file cannot be read
        """
        if self._armed_us is not None and self._total_us() - self._armed_us >= self._stall_us:
            self._armed_us = None
        return self._armed_us is None

    def _total_us(self) -> int:
        try:
            text = os.pread(self.fd, 4096, 0).decode()
        except OSError as error:
            raise KernelFileError(self.path, error.errno or 0) from error
        psi = parse_psi(text, self.path)
        return psi.some_us if self._kind == "some" else psi.full_us

    def close(self) -> None:
        """Remove the trigger. Idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)
