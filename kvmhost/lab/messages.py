"""What the agent inside a host and the machine outside say to each other: lines of JSON."""

from __future__ import annotations

import json
import os
from typing import Any

from kvmhost.errors import LabError

__all__ = ["Channel"]

_LONGEST = 64 << 20


class Channel:
    """One end of a connection.

    :param fd: read and written; stays open
    :param host: that the other end belongs to, for errors
    """

    def __init__(self, fd: int, host: str) -> None:
        self._fd, self._host = fd, host
        self._rest = bytearray()

    def send(self, message: dict[str, Any]) -> None:
        """Write one message.

        :raises LabError: if the other side is gone
        """
        data = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            raise LabError(self._host, "its agent has ended", str(error.strerror)) from error

    def receive(self) -> dict[str, Any]:
        """Read one message.

        :raises LabError: if the other side is gone, or does not speak JSON
        """
        while (at := self._rest.find(b"\n")) < 0:
            try:
                data = os.read(self._fd, 1 << 16)
            except OSError as error:
                raise LabError(self._host, "its agent has ended", str(error.strerror)) from error
            if not data or len(self._rest) > _LONGEST:
                raise LabError(self._host, "its agent has ended", "no answer on lab.agent")
            self._rest += data
        line = bytes(self._rest[:at])
        del self._rest[: at + 1]
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise LabError(self._host, "its agent does not speak JSON", repr(line[:60]))
        return message

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send a question and return the answer.

        :raises LabError: if the other side is gone, or answers with an error
        """
        self.send(question)
        answer = self.receive()
        if "error" in answer:
            raise LabError(self._host, str(answer["error"]))
        return answer
