"""The host side of a serial port: this terminal, a file, a pty, or nothing.

======== =========================================================================
word     means
======== =========================================================================
stdio    standard output and input; a terminal is put into raw mode, and Ctrl-A x
         ends the machine (Ctrl-A Ctrl-A sends Ctrl-A)
file:P   output to a file, no input
pty      a new pseudo-terminal, whose name is printed
null     no output, no input
======== =========================================================================
"""

from __future__ import annotations

import os
import pty
import select
import sys
import termios
import threading
import tty
import typing
from collections.abc import Callable
from pathlib import Path

from kvmhost.closing import Closing
from kvmhost.devices.serial import Serial
from kvmhost.errors import HostError, LayoutError
from kvmhost.files import open_log
from kvmhost.signals import start_threads

__all__ = ["Console", "open_console"]

ESCAPE, QUIT = b"\x01", b"x"
_CHUNK_BYTES = 1024
#: For the input thread: it waits in read() if another process took the input first.
_JOIN_S = 1.0


class Console(Closing):
    """An open console: ``fd`` takes output, input goes to :meth:`feed`'s serial port.

    :ivar name: name by which a user can open it; empty for most
    """

    def __init__(
        self, fd: int, input_fd: int = -1, owned: tuple[int, ...] = (), name: str = ""
    ) -> None:
        self.fd, self.name = fd, name
        self._input_fd, self._owned = input_fd, owned
        self._saved: list[typing.Any] | None = None
        self._serial: Serial | None = None
        self._thread: threading.Thread | None = None
        self._wake = (-1, -1)

    @property
    def interactive(self) -> bool:
        """Whether input comes from a terminal, so that each byte is passed on at once."""
        return self._input_fd >= 0 and os.isatty(self._input_fd)

    def feed(self, serial: Serial, on_quit: Callable[[], None]) -> None:
        """Pass input on to a serial port from now on, in a thread.

        :param on_quit: called in that thread when the escape sequence to quit is typed
        """
        if self._input_fd < 0:
            return
        if self.interactive and self._input_fd == 0:
            if _in_background():
                return  # In the background: this process may not change or read the terminal.
            self._saved = termios.tcgetattr(0)
            tty.setraw(0, termios.TCSANOW)
            # Output processing stays: messages of this process need their line ends.
            mode = termios.tcgetattr(0)
            mode[1] = self._saved[1]
            termios.tcsetattr(0, termios.TCSANOW, mode)
        serial.set_unbuffered(self.interactive)
        self._serial, self._wake = serial, os.pipe()
        self._thread = threading.Thread(
            target=self._pump, args=(serial, on_quit), name="console", daemon=True
        )
        start_threads(self._thread)

    def _pump(self, serial: Serial, on_quit: Callable[[], None]) -> None:
        escaped = False
        poll = select.poll()
        poll.register(self._input_fd, select.POLLIN)
        poll.register(self._wake[0], select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if self._wake[0] in ready:
                return
            try:
                data = os.read(self._input_fd, _CHUNK_BYTES)
            except OSError:  # A pty whose other end is closed, for example.
                return
            if not data:
                return
            if self._saved is not None:
                data, escaped, quits = unescape(data, escaped)
                if quits:
                    on_quit()
                    return
            if serial.receive(data) < len(data):
                return

    def close(self) -> None:
        """Stop the thread, restore the terminal, close what was opened. Idempotent."""
        if self._thread is not None and self._serial is not None:
            self._serial.stop_input()
            os.write(self._wake[1], b"x")
            if self._thread is not threading.current_thread():
                self._thread.join(_JOIN_S)
            if not self._thread.is_alive():
                for fd in self._wake:
                    os.close(fd)
            self._thread = None
        if self._saved is not None:
            # Not TCSADRAIN: it waits for a terminal that was stopped with Ctrl-S.
            termios.tcsetattr(0, termios.TCSANOW, self._saved)
            self._saved = None
        for fd in self._owned:
            os.close(fd)
        self._owned = ()


def unescape(data: bytes, escaped: bool) -> tuple[bytes, bool, bool]:
    """Take escape sequences out of input.

    :param escaped: whether the byte before was the escape key
    :return: input for the guest, whether an escape is incomplete, whether to quit
    """
    out = bytearray()
    for value in data:
        byte = bytes([value])
        if escaped and byte == QUIT:
            return bytes(out), False, True
        if not escaped and byte == ESCAPE:
            escaped = True
            continue
        escaped = False
        out += byte
    return bytes(out), escaped, False


def open_console(
    word: str, stdout: typing.TextIO | None = None, with_input: bool = True
) -> Console:
    """Open the console that a word of the table above selects.

    :param stdout: what ``stdio`` writes to; standard output if not given
    :param with_input: whether ``stdio`` reads too
    :raises LayoutError: for an unknown word, or a file that cannot be written
    """
    if word == "stdio":
        out = (stdout or sys.stdout).fileno()
        return Console(out, 0 if with_input and _is_open(0) else -1)
    if word == "null":
        return Console(-1)
    if word == "pty":
        ours, theirs = pty.openpty()
        tty.setraw(theirs)
        os.set_blocking(ours, False)
        return Console(ours, ours, (ours, theirs), os.ttyname(theirs))
    if word.startswith("file:"):
        path = word.removeprefix("file:")
        try:
            fd = open_log(Path(path), keep=False, follow_last=True)
        except (HostError, LayoutError) as error:
            raise LayoutError(f"--serial {word}: {error}") from error
        return Console(fd, -1, (fd,))
    raise LayoutError(f"--serial {word!r}: need stdio, file:PATH, pty or null")


def _in_background() -> bool:
    try:
        return os.tcgetpgrp(0) != os.getpgrp()
    except OSError:
        return False  # Not the controlling terminal: no signal stops this process.


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
