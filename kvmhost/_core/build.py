"""Build of the C core: one cffi extension out of every ``.c`` file beside this one.

The public headers are read twice: by the C compiler, and by cffi, which parses
plain declarations only. :func:`declarations` bridges the two: it drops the
preprocessor lines of a header and leaves ``#define NAME number`` to the
compiler (``#define NAME ...``). Headers named ``*_internal.h`` or ``compat.h``
are for C alone. Kernel structures and constants are declared in ``*.cdef``.

What only x86 has is in :data:`ONLY_X86` and in files named ``*_x86.cdef``. For another
architecture the core is the walkers, the models, memory and the pager: everything but vCPUs.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import runpy
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cffi import FFI
from setuptools.command.build_ext import build_ext

__all__ = ["CFLAGS", "BuildExt", "c_sources", "declarations", "make_ffi"]

CORE = Path(__file__).resolve().parent
CFLAGS = [
    *("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"),
    # The kernel's 64-bit types are long long, on powerpc too.
    "-D__SANE_USERSPACE_TYPES__",
]

#: Sources and headers, without suffix, that are built on x86 alone.
ONLY_X86 = frozenset({"bench_exits", "msrs", "vcpu"})
#: Suffix of ``*_SUFFIX.cdef`` by what uname calls the machine.
ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64", "ppc64le": "powerpc"}

_DEFINE = re.compile(r"#define\s+([A-Z][A-Z0-9_]*)\s+(\S+)$")


def declarations(header: str) -> str:
    """Reduce a C header to what cffi's parser takes."""
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    header = header.replace("\\\n", " ")
    lines = []
    for line in header.splitlines():
        if not line.lstrip().startswith("#"):
            lines.append(line)
        elif (found := _DEFINE.match(line.strip())) is not None:
            name, value = found.groups()
            # Array sizes have to be known here; anything else the compiler knows better.
            lines.append(f"#define {name} {value if value.isdigit() else '...'}")
    return "\n".join(lines)


def _for_machine(paths: Iterable[Path], machine: str) -> list[Path]:
    """Leave out what another architecture than ``machine`` has."""
    kept = ARCHITECTURES.get(machine, "")
    others = tuple(f"_{name}.cdef" for name in ARCHITECTURES.values() if name != kept)
    return [
        path
        for path in sorted(paths)
        if not path.name.endswith(others) and (machine == "x86_64" or path.stem not in ONLY_X86)
    ]


def c_sources(machine: str) -> list[Path]:
    """Return the C files of the core on a machine."""
    return _for_machine(CORE.glob("*.c"), machine)


def public_headers(machine: str) -> list[Path]:
    """Headers that Python sees, in the order in which they may be included."""
    return [
        path
        for path in _for_machine(CORE.glob("*.h"), machine)
        if path.name != "compat.h" and not path.name.endswith("_internal.h")
    ]


def make_ffi(machine: str = "") -> FFI:
    """Describe the extension module to cffi.

    :param machine: that the module is for, as uname names it; default: this one
    """
    machine = machine or platform.machine()
    ffi = FFI()
    for path in _for_machine(CORE.glob("*.cdef"), machine):
        ffi.cdef(path.read_text())
    for path in public_headers(machine):
        ffi.cdef(declarations(path.read_text()))
    includes = "\n".join(f'#include "{path.name}"' for path in public_headers(machine))
    quiet = '#pragma GCC diagnostic ignored "-Wunused-parameter"\n'
    ffi.set_source("kvmhost._core._native", quiet + '#include "compat.h"\n' + includes)
    return ffi


class BuildExt(build_ext):
    """Build the C core, and the guests beside it where the compiler can."""

    def build_extension(self, ext: Any) -> None:
        """Generate the binding, then compile it with the core's sources."""
        generated = Path(self.build_temp) / "_native.c"
        generated.parent.mkdir(parents=True, exist_ok=True)
        make_ffi().emit_c_code(str(generated))
        ext.sources = [str(generated), *map(str, c_sources(platform.machine()))]
        ext.depends = [str(path) for path in CORE.glob("*.h")]
        ext.include_dirs = [str(CORE)]
        ext.extra_compile_args = list(CFLAGS)
        if os.environ.get("KVMHOST_WERROR"):
            ext.extra_compile_args.append("-Werror")
        ext.extra_link_args = ["-pthread"]
        super().build_extension(ext)

    def run(self) -> None:
        """Build the extension, then the guest images."""
        super().run()
        root = CORE.parents[1]
        target = root if self.inplace or self.editable_mode else Path(self.build_lib)
        with _importable(root):
            builder = runpy.run_path(str(root / "kvmhost" / "guests" / "build.py"))
            builder["build_guests"](target / "kvmhost" / "guests" / "x86_64")


@contextlib.contextmanager
def _importable(root: Path) -> Iterator[None]:
    """Make the project's modules importable; the build does not promise that they are."""
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
