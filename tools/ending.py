"""End of a command: signals, closed or full output, errors of the operating system.

====  =====================================================================
code  meaning
====  =====================================================================
0     done (``run``: the guest's own status)
1     failed; also: disk full, no memory, standard output closed or full
2     wrong usage or bad input; also: an output file that cannot be created there
124   timed out
125   failed on our side: internal error, triple fault, unexpected exit, a lab host's panic
126   a capability is missing; the message says which, and what to do
129   SIGHUP: the terminal was closed
130   SIGINT: Ctrl-C
143   SIGTERM
====  =====================================================================
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator
from types import FrameType

from kvmhost.errors import (
    CapabilityError,
    ControlError,
    GuestTimeout,
    HostError,
    ImageError,
    InUseError,
    KvmHostError,
    LabTimeout,
    LayoutError,
    NameInUseError,
    UnexpectedExit,
    VmGoneError,
)
from kvmhost.printable import printable, printable_lines
from kvmhost.reclaim.errors import ConfigError, KernelFileError, RecordError
from kvmhost.tools.parser import UsageExit
from kvmhost.tools.stuck import DeadlineFile, deadline_stderr
from kvmhost.tools.terminal import printable_streams

__all__ = [
    "ENDING_SIGNALS",
    "EXIT_FAILED",
    "EXIT_MISSING",
    "EXIT_USAGE",
    "Ended",
    "exit_code",
    "guard",
    "message_of",
]

EXIT_FAILED, EXIT_USAGE = 1, 2
EXIT_TIMEOUT, EXIT_OURS, EXIT_MISSING, EXIT_SIGNAL = 124, 125, 126, 128

#: Signals that end a command after it has removed its temporary files and sockets.
ENDING_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)

#: Exit codes by HTTP status: 400 is bad input, 501 a capability that the VM's host lacks.
_CODE_OF_STATUS = {400: EXIT_USAGE, 501: EXIT_MISSING}


class Ended(KeyboardInterrupt):
    """A signal requested the end of the command; cleanup is the same as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def guard(
    name: str,
    command: Callable[[], int],
    deadline_s: float | None = None,
    *,
    as_json: bool = False,
) -> int:
    """Run a command and return its exit code; an error is printed as one line.

    :param name: prefix of the line, such as ``kvmhost run``
    :param deadline_s: deadline of each write to standard output or error, for a command
        that must end even if its output is not read; None: no deadline
    :param as_json: print an error to standard output too, as docs/json.md says
    """
    with contextlib.nullcontext() if deadline_s is None else deadline_stderr():
        return _guard(name, command, deadline_s, as_json)


def _guard(name: str, command: Callable[[], int], deadline_s: float | None, as_json: bool) -> int:
    if not _open_standard_streams():
        print(f"{name}: standard output is closed; use >/dev/null to discard it", file=sys.stderr)
        return EXIT_FAILED
    with _ending_signals(), _recorded_stdout(deadline_s), printable_streams():
        try:
            status = _run(name, command, as_json)
        except KeyboardInterrupt as error:
            status = EXIT_SIGNAL + (error.number if isinstance(error, Ended) else signal.SIGINT)
        return _flush(name, status)


def _run(name: str, command: Callable[[], int], as_json: bool) -> int:
    try:
        return command()
    except SystemExit as error:  # argparse: 0 after --help, 2 after its message
        code = error.code if isinstance(error.code, int) else EXIT_FAILED
        if as_json and isinstance(error, UsageExit):
            _emit(error, error.message, code)
        return code
    except BrokenPipeError:
        return EXIT_FAILED
    except KvmHostError as error:
        _tell(name, str(error), _has_lines(error))
        if as_json:
            _emit(error, str(error), exit_code(error))
        return exit_code(error)
    except RuntimeError as error:
        # The interpreter raises this, without an errno, at a limit on memory or threads.
        if str(error) != "can't start new thread":
            raise
        _tell(name, message_of(MemoryError()))
        if as_json:
            _emit(error, message_of(MemoryError()), EXIT_FAILED)
        return EXIT_FAILED
    except (OSError, MemoryError) as error:
        if error is not _failure_of_stdout():  # _flush reports that
            _tell(name, message_of(error))
            if as_json:
                _emit(error, message_of(error), exit_code(error))
        return exit_code(error)


def _emit(error: BaseException, message: str, code: int) -> None:
    """Print an error as JSON; only now, since most commands start without msgspec."""
    from kvmhost.tools.outputs.base import emit_error

    with contextlib.suppress(OSError):  # _flush reports it
        emit_error(error, message, code)


def exit_code(error: Exception) -> int:
    """Return the documented exit code of an error."""
    if isinstance(error, KernelFileError | CapabilityError):
        return EXIT_MISSING
    if isinstance(error, ConfigError | ImageError | LayoutError | NameInUseError | RecordError):
        return EXIT_USAGE
    if isinstance(error, GuestTimeout | LabTimeout):
        return EXIT_TIMEOUT
    if isinstance(error, VmGoneError | InUseError | MemoryError):
        return EXIT_FAILED
    if isinstance(error, ControlError):
        return _CODE_OF_STATUS.get(error.status, EXIT_FAILED)
    if isinstance(error, KvmHostError) and not isinstance(error, HostError):
        return EXIT_OURS
    number = error.errno if isinstance(error, OSError) else None
    return EXIT_USAGE if HostError("", number or 0).is_bad_path else EXIT_FAILED


def message_of(error: OSError | MemoryError) -> str:
    """Return the message of an operating system error, without Python's ``[Errno N]``."""
    if isinstance(error, MemoryError):
        return "not enough memory; free some, or raise the limit on it (ulimit -v, memory cgroup)"
    if error.errno is None:
        return str(error)
    what = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    whole = HostError(what, error.errno)
    return str(whole) if what else str(whole).removeprefix(": ")


def _has_lines(error: Exception) -> bool:
    """Return whether a message has several lines: registers and code, or compiler output."""
    return isinstance(error, UnexpectedExit) or isinstance(error.__cause__, RuntimeError)


def _tell(name: str, text: str, has_lines: bool = False) -> None:
    with contextlib.suppress(OSError):
        shown = printable_lines(text) if has_lines else printable(text)
        print(f"{name}: {shown}", file=sys.stderr)


def _open_standard_streams() -> bool:
    """Open /dev/null for each closed standard descriptor, so that no file gets its number.

    :return: whether standard output was open
    """
    was_open = sys.stdout is not None
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            setattr(sys, name, os.fdopen(fd, mode))
    return was_open


@contextlib.contextmanager
def _ending_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception in the main thread; keep an ignored SIGHUP."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:
            signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> typing.NoReturn:
    # Once only: another signal must not interrupt the cleanup.
    signal.signal(number, signal.SIG_IGN)
    raise Ended(number)


class _Output(DeadlineFile):
    """Standard output that records a failed write, which argparse and others ignore."""

    failure: OSError | None = None

    def write(self, data: typing.Any) -> int:
        """Write; record the error if it fails."""
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


@contextlib.contextmanager
def _recorded_stdout(deadline_s: float | None) -> Iterator[None]:
    """Record failed writes to the standard output of this process."""
    before = sys.stdout
    if not isinstance(before, io.TextIOWrapper) or before is not sys.__stdout__:
        yield
        return
    before.flush()
    raw = _Output(before.fileno(), deadline_s)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw), before.encoding, before.errors, line_buffering=raw.isatty()
    )
    try:
        yield
    finally:
        sys.stdout = before


def _failure_of_stdout() -> OSError | None:
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, _Output) else None


def _flush(name: str, status: int) -> int:
    """Flush standard output; report an error such as a full disk, but not a closed pipe."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    failure = _failure_of_stdout()
    if failure is None:
        return status
    if not isinstance(failure, BrokenPipeError):
        _tell(name, f"standard output: {failure.strerror}")
    # Data left in the buffer must not cause another error at exit.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    return status or EXIT_FAILED
