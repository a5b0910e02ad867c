"""``python -m kvmhost.lab.agent OPTIONS``: a command inside a host that answers questions.

It starts the probes, then a guest: one of :mod:`kvmhost.lab.epochs`, or any command. Then it
answers on the port ``lab.agent``, until it is told to end or the guest's command has ended.

| question | answer |
|---|---|
| ``{"do": "roots"}`` | ``{"roots": [...], "running": bool}``: of each VM that exists |
| ``{"do": "epoch"}`` | ``{"touched": [...]}``: gfns that the guest touched meanwhile |
| ``{"do": "tracker"}`` | ``{"young": [...] or null}``: what the tracker beside it saw |
| ``{"do": "shell", "command": "..."}`` | ``{"status": n, "output": "..."}`` |
| ``{"do": "close"}`` | ``{}``: the guest has ended |
| ``{"do": "end"}`` | none |

An error is ``{"error": "..."}``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvmhost.errors import KvmHostError, LabError
from kvmhost.files import os_errors
from kvmhost.lab.epochs import EpochGuest, open_guest
from kvmhost.lab.messages import Channel
from kvmhost.lab.probes import RootProbe

__all__ = ["main"]

_PORT = "lab.agent"
_PORTS = Path("/sys/class/virtio-ports")


class Agent:
    """Answers questions about one guest.

    :param options: as :func:`~kvmhost.lab.epochs.open_guest`, or ``command``; ``cgroup``: name of
        a new memory cgroup for the guest
    """

    def __init__(self, probe: RootProbe, options: dict[str, Any]) -> None:
        self._probe = probe
        if name := options.get("cgroup"):
            _enter_cgroup(name)
        self._guest: EpochGuest | None = None
        self._process: subprocess.Popen[bytes] | None = None
        if command := options.get("command"):
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        else:
            self._guest = open_guest(options)

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a question.

        :raises LabError: if there is none
        """
        kind = question.get("do")
        if kind == "roots":
            return {
                "roots": [dataclasses.asdict(root) for root in self._probe.roots()],
                "running": self._process is None or self._process.poll() is None,
            }
        if kind == "shell":
            found = subprocess.run(
                ["/bin/sh", "-c", question["command"]], capture_output=True, check=False
            )
            text = (found.stdout + found.stderr).decode(errors="replace")
            return {"status": found.returncode, "output": text}
        if kind == "close":
            self.close()
            return {}
        if self._guest is None:
            raise LabError("agent", f"no answer to {kind!r} for a guest that is a command")
        if kind == "epoch":
            return {"touched": self._guest.run_epoch()}
        if kind == "tracker":
            return {"young": self._guest.tracker_gfns()}
        raise LabError("agent", f"no such question: {kind!r}")

    def close(self) -> None:
        """End the guest."""
        if self._guest:
            self._guest.close()
            self._guest = None
        if self._process:
            self._process.kill()
            self._process.wait()


def main(argv: list[str]) -> int:
    """Answer until told to end."""
    options = json.loads(argv[0])
    channel = Channel(_port(), "agent")
    with RootProbe() as probe:
        try:
            agent = Agent(probe, options)
        except (KvmHostError, OSError) as error:
            channel.send({"error": str(error)})
            return 1
        with contextlib.closing(agent):
            channel.send({"pid": os.getpid()})
            while (question := channel.receive()).get("do") != "end":
                try:
                    channel.send(agent.answer(question))
                except (KvmHostError, OSError) as error:
                    channel.send({"error": str(error)})
    return 0


def _enter_cgroup(name: str) -> None:
    """Move this process into a new memory cgroup, so that its memory is charged there."""
    folder = Path("/sys/fs/cgroup") / name
    with os_errors(folder):
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.procs").write_text(str(os.getpid()))


def _port() -> int:
    """Open the port, for as long as this process lives."""
    for folder in _PORTS.iterdir():
        if (folder / "name").read_text().strip() == _PORT:
            return os.open(Path("/dev") / folder.name, os.O_RDWR | os.O_CLOEXEC)
    raise LabError("agent", f"no port {_PORT}: run it in a host of kvmhost lab")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
