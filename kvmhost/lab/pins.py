"""The packages of each kernel, with exact versions and checksums: ``pins.toml``."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import tomllib
from collections.abc import Mapping
from pathlib import Path

__all__ = ["KernelPins", "Pin", "pinned"]

_FILE = Path(__file__).with_name("pins.toml")


@dataclasses.dataclass(frozen=True)
class Pin:
    """One version of one package.

    :ivar sha256: of the archive, in hex
    """

    suite: str
    name: str
    version: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class KernelPins:
    """What a kernel and its initial file system are made of.

    :ivar meta_suite: suite of ``meta``
    :ivar meta: the package whose dependencies name the newest kernel
    """

    kernel: str
    architecture: str
    meta_suite: str
    meta: str
    packages: tuple[Pin, ...]

    @property
    def version(self) -> str:
        """The version of the kernel's first package."""
        return self.packages[0].version

    def digest(self) -> str:
        """Return 12 hex digits that stand for exactly these packages."""
        text = "\n".join(pin.sha256 for pin in self.packages)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def pinned(kernel: str) -> KernelPins:
    """Return the packages of a kernel.

    :raises KeyError: for a kernel that ``pins.toml`` lacks
    """
    return _all()[kernel]


@functools.cache
def _all() -> Mapping[str, KernelPins]:
    with _FILE.open("rb") as file:
        tables = tomllib.load(file)["kernels"]
    return {
        kernel: KernelPins(
            kernel,
            table["architecture"],
            table["meta"]["suite"],
            table["meta"]["name"],
            tuple(Pin(**package) for package in table["packages"]),
        )
        for kernel, table in tables.items()
    }
