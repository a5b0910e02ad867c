"""The initial file system of a host: busybox, modules, and scripts of this folder.

It has two parts, archives that follow one another: :func:`base_archive` depends on the kernel
and is cached, :func:`job_archive` holds the command to run.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvmhost.lab.cpio import cpio_archive
from kvmhost.lab.hosts import LabHost
from kvmhost.lab.kernel import KernelTree

__all__ = ["Job", "base_archive", "job_archive", "recipe"]

_HERE = Path(__file__).parent
_FOLDERS = ("dev", "proc", "sys")


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run inside a host, as root.

    :ivar argv: the command; in a shell's place, an interactive one is started
    :ivar directory: where, in the root file system of the host
    :ivar environment: all of it
    :ivar interactive: on the host's console, instead of the two output ports
    """

    argv: Sequence[str]
    directory: Path
    environment: Mapping[str, str]
    interactive: bool = False


def recipe(host: LabHost) -> str:
    """Return what :func:`base_archive` depends on besides the kernel's packages."""
    texts = (_script("init.sh"), _script("session.sh"))
    return "\n".join((*host.modules, *(text.decode() for text in texts)))


def base_archive(host: LabHost, tree: KernelTree, busybox: bytes) -> bytes:
    """Return the part that depends on the kernel.

    :raises ImageError: if the kernel lacks a module that the host needs
    """
    order = tree.load_order(host.modules)
    files = {
        "init": _script("init.sh"),
        "session.sh": _script("session.sh"),
        "bin/busybox": busybox,
        "modules/order": "".join(f"{name}\n" for name in order).encode(),
    }
    files |= {f"modules/{name}.ko": tree.read(name) for name in order}
    return cpio_archive(files, _FOLDERS)


def job_archive(job: Job, project: Mapping[str, bytes]) -> bytes:
    """Return the part with the command, and with files of the project by name, if any."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    directory = shlex.quote(str(job.directory))
    lines.append(f"cd {directory} || exit 125")
    lines.append(f"exec {shlex.join(job.argv)}")
    mode = "shell" if job.interactive else "run"
    files = {"job.sh": "\n".join([*lines, ""]).encode(), "mode": mode.encode()}
    files |= {f"project/{name}": data for name, data in project.items()}
    return cpio_archive(files)


def _script(name: str) -> bytes:
    return (_HERE / name).read_bytes()
