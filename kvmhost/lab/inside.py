"""What is inside a host: its root file system, this project, and where commands run.

A host of this machine's architecture has this machine's files. Another one has a root made of
packages, and the project's files beside it, with a core built for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvmhost.errors import CapabilityError
from kvmhost.lab import cache
from kvmhost.lab.hosts import LabHost, RootKind
from kvmhost.lab.initrd import Job
from kvmhost.lab.project import INSIDE, build_core, core_folder, project_files
from kvmhost.lab.roots import make_root, root_folder

__all__ = ["LOOP", "inside_job", "prepare", "project_of", "python_of", "root_of"]

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: The guest of :mod:`kvmhost.lab.epochs`, inside a host of another architecture.
LOOP = INSIDE / "loop.bin"


def prepare(host: LabHost, tell: Callable[[str], None]) -> None:
    """Make sure that root and core of a host are in the cache.

    :raises CapabilityError: if packages cannot be downloaded, or there is no cross compiler
    :raises HostError: if the cache cannot be written
    """
    if host.root is RootKind.PACKAGES:
        make_root(host.architecture, tell)
        build_core(host.architecture, tell)


def root_of(host: LabHost) -> Path:
    """Return the folder that is a host's root.

    :raises CapabilityError: if it is not in the cache
    """
    if host.root is RootKind.MACHINE:
        return Path("/")
    return root_folder(host.architecture)


def project_of(host: LabHost) -> Mapping[str, bytes]:
    """Return the project's files for a host that does not have this machine's.

    :raises CapabilityError: if the core for it is not in the cache
    """
    if host.root is RootKind.MACHINE:
        return {}
    folder = core_folder(host.architecture)
    if problem := cache.check_entry(folder):
        raise CapabilityError(
            f"lab host {host.name}", f"the core for {host.architecture} in the cache",
            f"which is not complete: {problem}", f"run: kvmhost lab fetch {host.name}",
        )  # fmt: skip
    return project_files(folder)


def python_of(host: LabHost) -> str:
    """Return the interpreter inside a host."""
    return sys.executable if host.root is RootKind.MACHINE else "python3"


def inside_job(host: LabHost, argv: Sequence[str], *, interactive: bool = False) -> Job:
    """Return a command as a job of a host: in this directory if it exists there, else in /.

    This interpreter's programs come first where they exist.
    """
    environment = {"HOME": "/root", "LANG": "C.UTF-8", "TERM": os.environ.get("TERM", "")}
    if host.root is RootKind.PACKAGES:
        environment |= {"PATH": _PATH, "PYTHONPATH": str(INSIDE)}
        return Job(argv, Path("/"), environment, interactive)
    environment["PATH"] = f"{Path(sys.executable).parent}:{_PATH}"
    return Job(argv, Path.cwd(), environment, interactive)
