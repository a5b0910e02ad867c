"""The second-stage tables of a guest inside an emulated host, harvested from outside.

::

    with open_tables(find_host("amd64-6.12"), {"n_pages": 2048, "stride": 3}) as tables:
        touched = tables.run_epoch()
        young = tables.harvest(1024, 2048)

An agent inside (:mod:`kvmhost.lab.agent`) reports the root; the walkers of
:mod:`kvmhost.mmu` do the rest, in the host's memory. They take no lock of the host, run while its
vCPUs run, and change nothing but accessed bits.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kvmhost.bitmap import Words, YoungBitmap
from kvmhost.errors import LabError, LabTimeout, TableError
from kvmhost.lab.hosts import LabHost, RootKind
from kvmhost.lab.inside import LOOP, inside_job, python_of
from kvmhost.lab.messages import Channel
from kvmhost.lab.ram import HostMemory, ram_layout
from kvmhost.lab.running import JobOutput, RunningHost
from kvmhost.mmu.kvmtable import KvmTable, TableRoot
from kvmhost.signals import start_threads

__all__ = ["GuestTables", "open_tables"]


class GuestTables:
    """A running host, the agent inside it, and the tables of the guest that the agent runs.

    :param on_output: called with what the agent and its guest write, in another thread
    :raises LabError: if the host or its agent ends, or the guest does not start
    """

    def __init__(
        self, running: RunningHost, timeout_s: float, on_output: Callable[[JobOutput], None]
    ) -> None:
        self._running, self._timeout_s, self._on_output = running, timeout_s, on_output
        self._stack = contextlib.ExitStack()
        self._root: TableRoot | None = None
        self._table: KvmTable | None = None
        self._end: LabError | None = None
        self._pump = threading.Thread(target=self._take_output, name="lab-output", daemon=True)
        start_threads(self._pump)
        layout = ram_layout(running.host.machine, running.mem_bytes)
        self._memory = self._stack.enter_context(HostMemory(running.ram, layout))
        self._channel = Channel(running.agent.fileno(), running.host.name)
        with self._own_error():
            if "error" in (first := self._channel.receive()):
                raise LabError(running.host.name, str(first["error"]))

    def _take_output(self) -> None:
        """Pass output on until the host ends; its end also ends the agent's connection."""
        try:
            for event in self._running.events(self._timeout_s):
                if isinstance(event, JobOutput):
                    self._on_output(event)
        except LabError as error:
            self._end = error
            if isinstance(error, LabTimeout):
                self._running.end()

    @contextlib.contextmanager
    def _own_error(self) -> Iterator[None]:
        """Replace the error of a broken connection by what happened to the host."""
        try:
            yield
        except LabError:
            if not self._running.is_on:
                self._pump.join(60)
            if self._end is not None:
                raise self._end from None
            raise

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """Ask the agent; its questions are in :mod:`kvmhost.lab.agent`.

        :raises LabError: if it, or its host, has ended, or it answers with an error
        """
        with self._own_error():
            return self._channel.ask({"do": do, **details})

    def roots(self) -> list[TableRoot]:
        """Return the roots of all guests that exist in the host, in the order of their start."""
        return [
            TableRoot(**{name: value for name, value in root.items() if name != "vm"})
            for root in self.ask("roots")["roots"]
        ]

    def table(self) -> KvmTable:
        """Return the table of the guest, from its first harvest on the same one.

        :raises TableError: if there is no guest, or its root is another one than before
        """
        roots = self.roots()
        if not roots:
            was = f"; it was {self._root}" if self._root else ""
            raise TableError(f"no guest has a root{was}")
        root = roots[0]
        if self._root is not None and root != self._root:
            before, self._root = self._root, None
            raise TableError(f"the root changed: it is {root}, and was {before}")
        if self._table is None or self._root is None:
            self._close_table()
            self._table = KvmTable(self._memory.table_memory(), root)
            self._root = root
        return self._table

    def harvest(
        self, gfn_start: int, n_pages: int, *, clear: bool = True, mask: Words | None = None
    ) -> YoungBitmap:
        """Test, or test and clear, a range; :meth:`~kvmhost.mmu.harvest.WalkedTable.harvest`.

        :raises TableError: if there is no root, it changed since the last harvest or during
            this one, or an entry makes no sense; the next harvest starts with the root of then
        """
        young = self.table().harvest(gfn_start, n_pages, clear, mask)
        self.table()
        return young

    def run_epoch(self) -> list[int]:
        """Run the guest for an epoch; return the gfns (4 KiB) that it touched, computed."""
        return [int(gfn) for gfn in self.ask("epoch")["touched"]]

    def tracker_gfns(self) -> list[int] | None:
        """Return what the tracker inside saw since the last call; None without one."""
        young: list[int] | None = self.ask("tracker")["young"]
        return young

    def _close_table(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None

    def close(self) -> None:
        """Unmap the host's memory; end the agent, if it still is there."""
        with contextlib.suppress(LabError):
            self._channel.send({"do": "end"})
        self._close_table()
        self._stack.close()


@contextlib.contextmanager
def open_tables(
    host: LabHost,
    options: Mapping[str, Any],
    *,
    mem_bytes: int = 3 << 30,
    timeout_s: float = 3600.0,
    on_output: Callable[[JobOutput], None] | None = None,
) -> Iterator[GuestTables]:
    """Boot a host with an agent and a guest; end it at the end of the context.

    :param options: of :func:`kvmhost.lab.epochs.open_guest`, or ``command``
    :raises LabError: if the host, its agent or its guest does not start
    :raises CapabilityError: if QEMU or the host's kernel is missing
    """
    values = {"n_pages": 1024, "stride": 3, "write": False, "huge": False, **options}
    if host.root is RootKind.PACKAGES:
        values["binary"] = str(LOOP)
    job = inside_job(host, [python_of(host), "-m", "kvmhost.lab.agent", json.dumps(values)])
    with RunningHost(host, job, mem_bytes=mem_bytes) as running:
        tables = GuestTables(running, timeout_s, on_output or (lambda _: None))
        with contextlib.closing(tables):
            yield tables
