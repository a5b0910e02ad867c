"""QEMU's monitor (QMP): starts a machine that waits for it."""

from __future__ import annotations

import json
import socket
from typing import Any

from kvmhost.errors import LabError

__all__ = ["Monitor"]


class Monitor:
    """The monitor of a QEMU that was started with ``-S`` and has not run its machine yet.

    :param connection: to the monitor; stays open, with its time-out
    :param host: for errors
    """

    def __init__(self, connection: socket.socket, host: str) -> None:
        self._lines = connection.makefile("rwb")
        self._host = host

    def wait_until_ready(self) -> None:
        """Return when the machine is made and its memory filled, as after a reset.

        :raises LabError: if QEMU ends before, or does not answer in time
        """
        if "QMP" not in self._receive():
            raise LabError(self._host, "QEMU's monitor does not greet")
        self._execute("qmp_capabilities")

    def start(self) -> None:
        """Let the machine run.

        :raises LabError: if QEMU refuses, ends before, or does not answer in time
        """
        self._execute("cont")

    def close(self) -> None:
        """Let go of the connection, which its owner closes."""
        self._lines.close()

    def _execute(self, command: str) -> None:
        try:
            self._lines.write(json.dumps({"execute": command}).encode() + b"\n")
            self._lines.flush()
        except OSError as error:
            raise LabError(self._host, "QEMU's monitor is gone", str(error.strerror)) from error
        while "return" not in (answer := self._receive()):
            if "error" in answer:
                raise LabError(self._host, f"QEMU refuses {command}", str(answer["error"]))

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except OSError as error:
            raise LabError(self._host, "QEMU's monitor does not answer", str(error)) from error
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise LabError(self._host, "QEMU's monitor has ended")
        return message
