"""A client of a daemon's socket.

>>> with DaemonClient.of_vm("a") as daemon:  # doctest: +SKIP
...     print(daemon.page("a", 0x400).verdict)
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from kvmhost.control import schema
from kvmhost.control.caller import Caller
from kvmhost.control.client import Client
from kvmhost.errors import VmGoneError
from kvmhost.reclaim.account.decisions import Decision
from kvmhost.reclaim.control import schema as answers
from kvmhost.reclaim.control.paths import socket_of

__all__ = ["DaemonClient"]


class DaemonClient(Caller):
    """A connection to one daemon.

    Every method raises what :class:`~kvmhost.control.client.Client` raises.

    :param daemon: name of the daemon, or path of its socket
    :raises LayoutError: for a bad name
    """

    #: Large enough for the metrics and decisions of many VMs.
    max_answer_bytes = 64 << 20

    def __init__(self, daemon: str | Path, *, timeout_s: float = schema.CLIENT_TIMEOUT_S) -> None:
        given = str(daemon)
        path = Path(daemon) if isinstance(daemon, Path) or "/" in given else socket_of(given)
        super().__init__(f"reclaimd {given}", path, timeout_s)

    @classmethod
    def of_vm(cls, vm: str) -> Self:
        """Find the daemon that manages a VM, by asking the VM.

        :raises VmGoneError: if there is no such VM, or no daemon manages it
        """
        with Client(vm) as client:
            lease = client.lease()
        if lease is None or not lease.socket:
            raise VmGoneError(vm, "no daemon looks after it")
        return cls(Path(lease.socket))

    def status(self) -> answers.DaemonStatus:
        """Return the status of the daemon and its VMs."""
        return self._get("status", answers.DaemonStatus)

    def metrics(self) -> str:
        """Return the metrics as Prometheus text."""
        return self._call("GET", "http://vm/metrics").text

    def config(self) -> str:
        """Return the options in force, as TOML."""
        return self._call("GET", "config").text

    def decisions(
        self, count: int = 100, *, vm: str | None = None, gfn: int | None = None, after: int = 0
    ) -> list[Decision]:
        """Return the latest decisions, the oldest first."""
        given = {"count": count, "vm": vm, "gfn": gfn, "after": after}
        query = {name: value for name, value in given.items() if value is not None}
        answer = self._call("GET", "decisions", params=query)
        return self._read(answer, answers.DecisionList).decisions

    def page(self, vm: str, gfn: int) -> answers.PageAnswer:
        """Return what the daemon knows about one page."""
        answer = self._call("GET", "page", params={"vm": vm, "gfn": gfn})
        return self._read(answer, answers.PageAnswer)

    def show_lru_gen(self, vm: str | None = None, *, full: bool = False) -> str:
        """Return the generations of one VM, or of all VMs.

        :param full: with the statistics of the kernel's ``lru_gen_full``
        """
        query = {} if vm is None else {"vm": vm}
        if full:
            query["full"] = "true"
        answer = self._call("GET", "lru_gen", params=query)
        return self._read(answer, answers.LruGenText).text

    def lru_gen_enabled(self, vm: str, value: str | None = None) -> str:
        """Return the mask of capabilities of a VM's policy, after setting it to a value."""
        if value is None:
            answer = self._call("GET", "lru_gen/enabled", params={"vm": vm})
        else:
            body = schema.encode(answers.EnabledRequest(vm, value))
            headers = {"Content-Type": "application/json"}
            answer = self._call("POST", "lru_gen/enabled", content=body, headers=headers)
        return self._read(answer, answers.LruGenText).text

    def run_lru_gen(self, command: str) -> int:
        """Run commands of lru_gen's text interface; return the number of evicted pages."""
        body = schema.encode(answers.CommandRequest(command))
        headers = {"Content-Type": "application/json"}
        answer = self._call("POST", "lru_gen", content=body, headers=headers)
        return self._read(answer, answers.LruGenReport).evicted_pages
