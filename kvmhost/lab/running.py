"""Boots a host, passes on what its command writes, and ends it.

A host is a QEMU process whose memory is a file that others can map. The command inside writes
to ports that are sockets here; its status comes over a port of its own. Nothing is left
behind, whatever happens: the memory is a memfd, the process dies with its parent, and the
console's text is in a temporary file.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
import re
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from kvmhost.errors import HostError, LabError, LabTimeout
from kvmhost.files import os_errors
from kvmhost.lab.devicetree import AddedProperty, patch_device_tree
from kvmhost.lab.fetching import BootFiles, boot_files
from kvmhost.lab.hosts import LabHost
from kvmhost.lab.initrd import Job, job_archive
from kvmhost.lab.inside import project_of, root_of
from kvmhost.lab.monitor import Monitor
from kvmhost.lab.qemu import PORTS, Devices, command_line, probe_qemu
from kvmhost.lab.ram import ram_layout
from kvmhost.lab.scratch import scratch_folder
from kvmhost.timescale import scaled

__all__ = ["HostReady", "JobEnded", "JobOutput", "RunningHost"]

#: From "status N" to the end of the process.
_POWER_OFF_S = 60.0
#: From the start of QEMU until its monitor answers.
_MONITOR_S = 60.0
#: From the end of QEMU's monitor to the end of its process.
_ENDING_S = 5.0
_PR_SET_PDEATHSIG = 1
_PANIC = re.compile(r"^.*?((?:Kernel panic|kvmhost-lab:).*)$", re.MULTILINE)
_CONTROL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1bc|\r")


@dataclasses.dataclass(frozen=True)
class HostReady:
    """The host has booted; its command starts."""


@dataclasses.dataclass(frozen=True)
class JobOutput:
    """The command wrote something.

    :ivar error: to standard error
    """

    data: bytes
    error: bool = False


@dataclasses.dataclass(frozen=True)
class JobEnded:
    """The command ended.

    :ivar status: exit status, 128 and the signal's number if a signal ended it
    """

    status: int


class RunningHost:
    """An emulated host that runs one command.

    >>> with RunningHost(find_host("amd64-6.12"), job) as host:  # doctest: +SKIP
    ...     for event in host.events(timeout_s=600):
    ...         print(event)

    :param keep: empty folder for the host's memory and console, which stay
    :ivar ram: path of the host's memory, for mappings; as long as the host exists
    :raises CapabilityError: if QEMU or the host's kernel is missing
    :raises HostError: if the system refuses memory, a file or a process
    """

    def __init__(
        self,
        host: LabHost,
        job: Job,
        *,
        mem_bytes: int = 3 << 30,
        keep: Path | None = None,
    ) -> None:
        probe_qemu(host)
        files = boot_files(host)
        shared, project = root_of(host), project_of(host)
        self.host, self.mem_bytes = host, mem_bytes
        self._resources = contextlib.ExitStack()
        self._open = True
        self._status: int | None = None
        self._control = b""
        try:
            self._start(files, job_archive(job, project), job.interactive, shared, keep)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process of the emulator."""
        return self._process.pid

    @property
    def is_on(self) -> bool:
        """Whether the emulator runs."""
        return self._process.poll() is None

    def end(self) -> None:
        """End the emulator; its ports then report their end."""
        self._process.kill()

    @property
    def agent(self) -> socket.socket:
        """The other end of the port ``lab.agent``, for a command that answers questions."""
        return self._ports["lab.agent"]

    def console_text(self) -> str:
        """Return what the host wrote to its console so far, without control codes."""
        if self._console is None:
            return ""
        with os_errors(self._console):
            raw = self._console.read_bytes() if self._console.exists() else b""
        return _CONTROL_CODES.sub("", raw.decode(errors="replace"))

    def events(self, timeout_s: float) -> Iterator[HostReady | JobOutput | JobEnded]:
        """Yield what happens, until the command has ended and the host is off.

        :param timeout_s: for all of it
        :raises LabTimeout: if the command has not ended by then
        :raises LabError: if the host ends without its command's status
        """
        deadline, powering_off = time.monotonic() + timeout_s, False
        with selectors.DefaultSelector() as selector:
            for name in PORTS[:3]:
                port = self._ports[name]
                selector.register(port, selectors.EVENT_READ, name)
            while selector.get_map():
                left_s = max(deadline - time.monotonic(), 0)
                ready = selector.select(None if left_s == math.inf else left_s)
                if not ready:
                    if self._status is None:
                        raise LabTimeout(self.host.name, timeout_s, self._evidence())
                    self.end()  # it does not power off
                    deadline = math.inf
                for key, _ in ready:
                    yield from self._read(selector, key)
                if self._status is not None and not powering_off:
                    powering_off, deadline = True, time.monotonic() + _POWER_OFF_S
        if self._status is None:
            raise self._failed()
        yield JobEnded(self._status)

    def _read(
        self, selector: selectors.BaseSelector, key: selectors.SelectorKey
    ) -> Iterator[HostReady | JobOutput]:
        assert isinstance(key.fileobj, socket.socket)
        try:
            data = key.fileobj.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            selector.unregister(key.fileobj)
        elif key.data != "lab.control":
            yield JobOutput(data, error=key.data == "lab.err")
        else:
            yield from self._take_control(data)

    def _take_control(self, data: bytes) -> Iterator[HostReady]:
        *lines, self._control = (self._control + data).split(b"\n")
        for line in lines:
            word, _, value = line.partition(b" ")
            if word == b"ready":
                yield HostReady()
            elif word == b"status" and value.isdigit():
                self._status = int(value)

    def close(self) -> None:
        """End the host, whatever it does, and free its memory. Idempotent."""
        if self._open:
            self._open = False
            self._resources.close()

    def _start(
        self, files: BootFiles, archive: bytes, interactive: bool, shared: Path, keep: Path | None
    ) -> None:
        folder = keep or self._resources.enter_context(scratch_folder())
        with os_errors(folder):
            (folder / "initrd").write_bytes(files.initrd.read_bytes() + archive)
        self._console = None if interactive else folder / "console.log"
        ram_fd = self._open_ram(keep)
        self.ram = Path(f"/proc/{os.getpid()}/fd/{ram_fd}") if keep is None else keep / "ram"
        names = (*PORTS, "monitor") if self.host.added_property else PORTS
        theirs = self._open_ports(names)
        devices = Devices(
            files.kernel, folder / "initrd", Path(f"/proc/self/fd/{ram_fd}"), self.mem_bytes,
            shared, tuple(theirs[: len(PORTS)]), self._console, *theirs[len(PORTS) :],
        )  # fmt: skip
        self._messages = None if interactive else folder / "qemu.log"
        command = command_line(self.host, devices)
        try:
            self._process = _spawn(command, (ram_fd, *theirs), self._messages)
        finally:
            for fd in theirs:
                os.close(fd)
        self._resources.callback(self._kill)
        if self.host.added_property:
            self._start_patched(self.host.added_property)

    def _start_patched(self, added: AddedProperty) -> None:
        """Let the machine run, with a property more in its device tree."""
        connection = self._ports["monitor"]
        connection.settimeout(scaled(_MONITOR_S))
        monitor = Monitor(connection, self.host.name)
        self._resources.callback(monitor.close)
        try:
            monitor.wait_until_ready()
        except LabError as error:
            try:
                self._process.wait(scaled(_ENDING_S))
            except subprocess.TimeoutExpired:
                raise error from None
            raise self._failed() from error
        for part in ram_layout(self.host.machine, self.mem_bytes):
            if part.pa <= added.pa < part.pa + part.n_bytes:
                patch_device_tree(self.ram, part.offset + added.pa - part.pa, added)
        monitor.start()

    def _open_ram(self, keep: Path | None) -> int:
        with os_errors("memory of the host"):
            if keep is None:
                fd = os.memfd_create("kvmhost-lab", os.MFD_CLOEXEC)
            else:
                fd = os.open(keep / "ram", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._resources.callback(os.close, fd)
            os.ftruncate(fd, self.mem_bytes)
        return fd

    def _open_ports(self, names: Sequence[str]) -> list[int]:
        """Make a pair of sockets for each port; return QEMU's ends."""
        self._ports: dict[str, socket.socket] = {}
        theirs = []
        for name in names:
            ours, other = socket.socketpair()
            self._resources.callback(ours.close)
            self._ports[name] = ours
            theirs.append(other.detach())
        return theirs

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _failed(self) -> LabError:
        """Return the error of a host that is gone without a status."""
        code = self._process.wait()
        if code:
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            return LabError(self.host.name, f"{self.host.qemu}: {how}", self._evidence())
        return LabError(self.host.name, "ended without a status of its command", self._evidence())

    def _evidence(self) -> str:
        """Return the line of the console, or of QEMU's messages, that says most."""
        text = self.console_text()
        if found := _PANIC.findall(text):
            return str(found[0])
        if self._messages is not None:
            text += self._messages.read_text(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else "nothing on its console"


def _spawn(
    command: list[str], fds: tuple[int, ...], messages: Path | None
) -> subprocess.Popen[bytes]:
    """Start a process that keeps some descriptors, ignores Ctrl-C, and dies with its parent.

    :param messages: file of its messages; None: it has this process's terminal
    """
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    with contextlib.ExitStack() as stack:
        log = stack.enter_context(messages.open("wb")) if messages else None
        try:
            return subprocess.Popen(
                command,
                stdin=None if log is None else subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=fds,
                preexec_fn=die_with_parent,
                start_new_session=True,
            )
        except OSError as error:
            raise HostError(command[0], error.errno or 0) from error
