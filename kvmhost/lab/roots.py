"""Root file systems of hosts of another architecture: packages, unpacked into the cache.

Nothing of them is configured: no maintainer script of another architecture can run here. What
Python needs beyond the files is made by :func:`make_root`.
"""

from __future__ import annotations

import functools
import hashlib
import tomllib
from collections.abc import Callable
from pathlib import Path

from kvmhost.errors import CapabilityError
from kvmhost.lab import cache
from kvmhost.lab.fetching import fetch_packages, unpack
from kvmhost.lab.pins import Pin

__all__ = ["make_root", "root_folder"]

_FILE = Path(__file__).with_name("roots.toml")
#: Alternatives that no script has chosen, and that numpy links to.
_LIBRARIES = ("blas/libblas.so.3", "lapack/liblapack.so.3")
#: Folders to mount on.
_FOLDERS = ("dev", "proc", "run", "sys", "tmp", "root")
_RECIPE = "1"


@functools.cache
def _pins(architecture: str) -> tuple[Pin, ...]:
    with _FILE.open("rb") as file:
        table = tomllib.load(file)["roots"][architecture]
    return tuple(Pin(suite=table["suite"], **package) for package in table["packages"])


def _folder(architecture: str) -> Path:
    text = "\n".join([_RECIPE, *(pin.sha256 for pin in _pins(architecture))])
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return cache.cache_folder() / "roots" / f"{architecture}-{digest}"


def root_folder(architecture: str) -> Path:
    """Return the root for an architecture from the cache.

    :raises CapabilityError: if it is not there, or damaged
    """
    folder = _folder(architecture)
    if problem := cache.check_entry(folder):
        raise CapabilityError(
            f"a host of {architecture}", "its root file system in the cache",
            f"which is not complete: {problem}", "run: kvmhost lab fetch HOST",
        )  # fmt: skip
    return folder


def make_root(architecture: str, tell: Callable[[str], None]) -> Path:
    """Make sure that the root for an architecture is in the cache.

    :raises CapabilityError: if its packages cannot be downloaded
    :raises HostError: if the cache cannot be written
    """
    folder = _folder(architecture)
    if cache.check_entry(folder) is None:
        return folder
    archives = fetch_packages(_pins(architecture), architecture, tell)
    tell(f"root file system for {architecture}")
    with cache.filled_entry(folder) as partial:
        for archive in archives:
            unpack(archive, partial)
        for name in _FOLDERS:
            (partial / name).mkdir(exist_ok=True)
        _link_usr(partial)
        for library in _LIBRARIES:
            for path in partial.glob(f"usr/lib/*/{library}"):
                (path.parent.parent / path.name).symlink_to(library)
    return folder


def _link_usr(root: Path) -> None:
    """Link folders that live under usr in newer releases, where packages count on that."""
    for name in ("bin", "lib", "sbin", "lib64"):
        if not (root / name).exists() and (root / "usr" / name).exists():
            (root / name).symlink_to(f"usr/{name}")
