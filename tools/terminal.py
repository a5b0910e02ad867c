"""What commands write to the terminal: no control characters but this program's own.

Two layers. Each text of others (a name, a message, a field) is passed through
:func:`~kvmhost.printable.printable` where it is printed, so that a newline in it forges
no line. And all that is printed passes :class:`PrintableStream`, so that a place that was
forgotten, a traceback or a warning of a library cannot send an escape sequence either.
A guest's console does not pass here: its bytes go to the descriptor as they are.
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
    """A text stream in front of another one that shows control characters as escapes.

    Newlines and tabs pass. Everything but writing is the other stream's.

    :ivar rich_proxied_file: the other stream, under the name by which rich looks for it:
        its tables and colours are written there
    """

    def __init__(self, stream: typing.TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write text; return the length of what was given."""
        self.rich_proxied_file.write(printable_lines(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write pieces of text."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(self.rich_proxied_file, name)


def unfiltered(stream: typing.TextIO) -> typing.TextIO:
    """Return the stream behind a :class:`PrintableStream`, for this program's own sequences."""
    return stream.rich_proxied_file if isinstance(stream, PrintableStream) else stream


@contextlib.contextmanager
def printable_streams() -> Iterator[None]:
    """Have standard output and error pass :class:`PrintableStream`, tracebacks too."""
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
        # After an error of our own the interpreter shows it, once this is left.
        if sys.exc_info()[0] is None:
            sys.excepthook = before[2]


class LineFormatter(logging.Formatter):
    """A log record as one printable line; a traceback follows on lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: typing.Any) -> str:
        """Return the traceback."""
        return printable_lines(super().formatException(ei))


def log_to_stderr(form: str, *names: str) -> None:
    """Have the log records of these loggers written to standard error, a line each."""
    handler = _ErrorHandler()
    handler.setFormatter(LineFormatter(form))
    for name in names:
        logging.getLogger(name).handlers = [handler]


class _ErrorHandler(logging.Handler):
    """Writes to what is standard error at the time; what it does not take is lost."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        with contextlib.suppress(OSError, ValueError):
            print(self.format(record), file=sys.stderr, flush=True)


def _show_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(printable_lines("".join(traceback.format_exception(kind, error, trace))))
