"""Filter control characters from untrusted text that commands write to the terminal.

There are two layers. Text from other sources (a name, a message, a field) is passed through
:func:`~kvmhost.printable.printable` where it is printed, so that a newline in it cannot
forge a line. All output passes :class:`PrintableStream`, so that an unescaped text, a
traceback or a library's warning cannot send an escape sequence either. The console of a
guest bypasses both: its bytes are written to the descriptor unchanged.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
import typing
from collections.abc import Iterable, Iterator
from types import TracebackType

from kvmhost.printable import printable, printable_lines

__all__ = ["LineFormatter", "PrintableStream", "log_to_stderr", "printable_streams", "unfiltered"]


class PrintableStream:
    """A text stream that writes to another stream, with control characters as escapes.

    Newlines and tabs are kept. All attributes except the write methods are those of the
    other stream.

    :ivar rich_proxied_file: the other stream, under the attribute name that rich reads:
        rich writes its tables and colours to it
    """

    def __init__(self, stream: typing.TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write text; return its length before escaping."""
        self.rich_proxied_file.write(printable_lines(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write pieces of text."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(self.rich_proxied_file, name)


def unfiltered(stream: typing.TextIO) -> typing.TextIO:
    """Return the stream wrapped by a :class:`PrintableStream`, for kvmhost's escape sequences."""
    return stream.rich_proxied_file if isinstance(stream, PrintableStream) else stream


@contextlib.contextmanager
def printable_streams() -> Iterator[None]:
    """Wrap standard output and error in :class:`PrintableStream`, also for tracebacks."""
    before = sys.stdout, sys.stderr, sys.excepthook
    if isinstance(sys.stdout, PrintableStream):
        yield
        return
    sys.stdout = typing.cast("typing.TextIO", PrintableStream(sys.stdout))
    sys.stderr = typing.cast("typing.TextIO", PrintableStream(sys.stderr))
    sys.excepthook = _show_exception
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before[:2]
        # The interpreter shows an internal error after this context has been left.
        if sys.exc_info()[0] is None:
            sys.excepthook = before[2]


class LineFormatter(logging.Formatter):
    """Formats a log record as one printable line; a traceback follows on separate lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: typing.Any) -> str:
        """Return the traceback."""
        return printable_lines(super().formatException(ei))


def log_to_stderr(form: str, *names: str) -> None:
    """Write the log records of these loggers to standard error, one line per record."""
    handler = _ErrorHandler()
    handler.setFormatter(LineFormatter(form))
    for name in names:
        logging.getLogger(name).handlers = [handler]


class _ErrorHandler(logging.Handler):
    """Writes to the current ``sys.stderr``; records that cannot be written are lost."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        with contextlib.suppress(OSError, ValueError):
            print(self.format(record), file=sys.stderr, flush=True)


def _show_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(printable_lines("".join(traceback.format_exception(kind, error, trace))))
