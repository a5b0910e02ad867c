"""What was fetched and made: files in the user's cache folder, checked before they are used.

::

    $XDG_CACHE_HOME/kvmhost/lab/     (else ~/.cache/kvmhost/lab/)
        packages/SHA256.deb          archives as downloaded
        hosts/KERNEL-DIGEST/         kernel, initial file system, sums.json
        KERNEL.json                  newer packages than the pinned ones, after fetch --latest

Files and folders appear by a rename, when they are complete. A file whose checksum differs
counts as missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kvmhost.errors import HostError
from kvmhost.files import new_directory, os_errors, replacing, write_file
from kvmhost.lab.pins import KernelPins, Pin, pinned

__all__ = [
    "cache_folder",
    "check_entry",
    "chosen_pins",
    "discard",
    "entry_folder",
    "filled_entry",
    "find_package",
    "keep_choice",
    "keep_package",
]

_SUMS = "sums.json"


def cache_folder() -> Path:
    """Return the lab's cache folder, which may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return root / "kvmhost" / "lab"


def file_sha256(path: Path) -> str:
    """Return the checksum of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_package(pin: Pin) -> Path | None:
    """Return the archive of a package if it is in the cache and undamaged."""
    path = _package(pin)
    with contextlib.suppress(OSError):
        if file_sha256(path) == pin.sha256:
            return path
    return None


def keep_package(pin: Pin, archive: Path) -> Path:
    """Copy a downloaded archive into the cache.

    :raises HostError: if its checksum is not the pinned one, or the cache cannot be written
    """
    path = _package(pin)
    if (found := file_sha256(archive)) != pin.sha256:
        problem = f"{pin.name} {pin.version}: SHA-256 {found}, pinned is {pin.sha256}"
        raise HostError(problem, 74, "fetch again; the mirror's copy differs from the pinned one")
    _make(path.parent)
    with archive.open("rb") as source, replacing(path, sync=False) as target:
        shutil.copyfileobj(source, target)
    return path


def entry_folder(pins: KernelPins, recipe: str) -> Path:
    """Return the folder of what is made of some packages by a recipe, whether it exists or not.

    :param recipe: stands for everything else that the contents depend on
    """
    digest = hashlib.sha256(f"{pins.digest()}\n{recipe}".encode()).hexdigest()[:12]
    return cache_folder() / "hosts" / f"{pins.kernel}-{digest}"


@contextlib.contextmanager
def filled_entry(folder: Path) -> Iterator[Path]:
    """Fill a folder of the cache; it appears, with its checksums, at the end of the context.

    A damaged one is replaced. If another process makes it meanwhile, that one stays.

    :raises HostError: if the cache cannot be written
    """
    _make(folder.parent)
    if folder.exists():
        discard(folder)
    try:
        with new_directory(folder) as partial:
            yield partial
            files = sorted(p for p in partial.rglob("*") if p.is_file() and not p.is_symlink())
            sums = {str(p.relative_to(partial)): file_sha256(p) for p in files}
            write_file(partial / _SUMS, json.dumps(sums, indent=1).encode(), sync=False)
    except HostError:
        if check_entry(folder) is not None:
            raise


def check_entry(folder: Path) -> str | None:
    """Return what is wrong with a folder of the cache, or None if it is complete."""
    try:
        sums = json.loads((folder / _SUMS).read_bytes())
        for name, wanted in sums.items():
            if file_sha256(folder / name) != wanted:
                return f"{folder / name} is damaged"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{folder / _SUMS}: {error}"
    return None


def discard(folder: Path) -> None:
    """Remove a folder of the cache, with what it holds."""
    with os_errors(folder):
        shutil.rmtree(folder)


def chosen_pins(kernel: str) -> KernelPins:
    """Return the packages of a kernel: those of the last ``fetch --latest``, else the pinned."""
    pins = pinned(kernel)
    try:
        found = json.loads(_choice(kernel).read_bytes())
        return dataclasses.replace(pins, packages=tuple(Pin(**package) for package in found))
    except (OSError, ValueError, TypeError):
        return pins


def keep_choice(kernel: str, pins: KernelPins | None) -> None:
    """Record which packages of a kernel to use from now on; None stands for the pinned ones.

    :raises HostError: if the cache cannot be written
    """
    if pins is None:
        with os_errors(_choice(kernel)):
            _choice(kernel).unlink(missing_ok=True)
        return
    _make(cache_folder())
    packages = [dataclasses.asdict(pin) for pin in pins.packages]
    write_file(_choice(kernel), json.dumps(packages, indent=1).encode())


def _choice(kernel: str) -> Path:
    return cache_folder() / f"{kernel}.json"


def _package(pin: Pin) -> Path:
    return cache_folder() / "packages" / f"{pin.sha256}.deb"


def _make(folder: Path) -> None:
    with os_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
