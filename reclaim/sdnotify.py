"""Telling systemd how the daemon does: readiness, reloading, the watchdog.

A datagram to the socket that ``$NOTIFY_SOCKET`` names, of lines ``NAME=value``; where
there is none, nothing is sent. Source: sd_notify(3).
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

__all__ = ["SdNotifier"]


class SdNotifier:
    """Sends states to the service manager, if there is one.

    :param environ: where ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` are
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # An abstract address is written with @ for its leading NUL.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = 0.0
        mine = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        if mine and environ.get("WATCHDOG_USEC", "").isdigit():
            self.watchdog_s = int(environ["WATCHDOG_USEC"]) / 1e6

    def ready(self, status: str) -> None:
        """Say that the daemon works, and what it does."""
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """Say that options are being read; :meth:`ready` ends that."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def status(self, text: str) -> None:
        """Say what the daemon does."""
        self._send(f"STATUS={text}")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Say that the daemon ends."""
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        # A manager that went away, or does not read, must not hold up the daemon.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender,
        ):
            sender.setblocking(False)
            sender.sendto(text.encode(), self._address)
