"""A kernel's image and modules out of its unpacked packages."""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable
from pathlib import Path

from kvmhost.errors import ImageError

__all__ = ["KernelTree"]


class KernelTree:
    """Unpacked packages of one kernel.

    :param root: where they were unpacked
    :raises ImageError: if there is not exactly one kernel
    """

    def __init__(self, root: Path) -> None:
        trees = [*root.glob("lib/modules/*"), *root.glob("usr/lib/modules/*")]
        if len(trees) != 1:
            raise ImageError(str(root), "modules", f"{len(trees)} kernels instead of one")
        self.modules = trees[0]
        self.release = self.modules.name
        self.image = self._find_image(root)
        suffix = re.compile(r"\.ko(\.\w+)?$")
        self._files = {
            _normal(suffix.sub("", path.name)): path for path in self.modules.rglob("*.ko*")
        }
        self._builtin = self._find_builtin()

    def _find_image(self, root: Path) -> Path:
        names = (f"vmlinuz-{self.release}", f"vmlinux-{self.release}")
        for path in (self.modules / "vmlinuz", *(root / "boot" / name for name in names)):
            if path.exists():
                return path
        raise ImageError(str(root), "kernel", f"no image of {self.release}")

    def _find_builtin(self) -> set[str] | None:
        path = self.modules / "modules.builtin"
        if not path.exists():
            return None  # Linux 7.3's packages lack it
        return {_normal(Path(line).stem) for line in path.read_text().split()}

    def load_order(self, names: Iterable[str]) -> list[str]:
        """Return the modules to load, each after those that it depends on.

        Built-in ones are left out. Without a list of built-in modules, a module that has
        no file counts as one.

        :raises ImageError: if the kernel lacks one
        """
        ordered: dict[str, None] = {}

        def add(name: str) -> None:
            if name in ordered:
                return
            if name not in self._files:
                if self._builtin is not None and name not in self._builtin:
                    raise ImageError(str(self.modules), "modules", f"no {name}")
                return
            for other in _depends(self.read(name)):
                add(other)
            ordered[name] = None

        for name in names:
            add(_normal(name))
        return list(ordered)

    def read(self, name: str) -> bytes:
        """Return an uncompressed module."""
        path = self._files[_normal(name)]
        raw = path.read_bytes()
        return lzma.decompress(raw) if path.suffix == ".xz" else raw


def _normal(name: str) -> str:
    return name.replace("-", "_")


def _depends(module: bytes) -> list[str]:
    """Return the modules that one depends on, by the ``depends=`` string of its .modinfo."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [_normal(name) for name in found[1].decode().split(",") if name] if found else []
