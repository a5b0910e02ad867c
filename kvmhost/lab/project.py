"""This project's code for a host of another architecture.

The Python files go into the host's initial file system as they are. The C core is built
for the architecture by a cross compiler, with the stable ABI of Python, so that it does not matter
which Python the host has; the guest of :mod:`kvmhost.lab.epochs` is built beside it.
"""

from __future__ import annotations

import hashlib
import runpy
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from kvmhost.errors import CapabilityError
from kvmhost.lab import cache

__all__ = ["COMPILERS", "INSIDE", "build_core", "core_folder", "project_files"]

#: Where the project is inside such a host.
INSIDE = Path("/run/kvmhost-lab/project")
#: Cross compiler, its package, and what uname calls the machine, by Debian's architecture.
COMPILERS = {
    "arm64": ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross", "aarch64"),
    "ppc64el": (
        "powerpc64le-linux-gnu-gcc",
        "gcc-powerpc64le-linux-gnu libc6-dev-ppc64el-cross",
        "ppc64le",
    ),
}
_LOOPS = {"arm64": "loop_arm64.S", "ppc64el": "loop_powerpc.S"}
_MODULE, _LOOP = "_native.abi3.so", "loop"
_HERE = Path(__file__).parent
_PACKAGE = _HERE.parent
_CORE = _PACKAGE / "_core"
#: Oldest Python with the parts of the stable ABI that the binding uses.
_STABLE_ABI = "0x03090000"
#: Of the package: what hosts of another architecture have no use for.
_LEFT_OUT = {"docs", "__pycache__"}


def core_folder(architecture: str) -> Path:
    """Return the folder of the cache with the core for an architecture, built or not."""
    digest = hashlib.sha256()
    for path in (*sorted(_CORE.glob("*.[ch]")), *sorted(_CORE.glob("*.cdef")), _loop(architecture)):
        digest.update(path.read_bytes())
    digest.update((_CORE / "build.py").read_bytes())
    return cache.cache_folder() / "cores" / f"{architecture}-{digest.hexdigest()[:12]}"


def build_core(architecture: str, tell: Callable[[str], None]) -> Path:
    """Build the core for an architecture, unless the cache has it; return its folder.

    :raises CapabilityError: if there is no cross compiler, or it fails
    :raises HostError: if the cache cannot be written
    """
    folder = core_folder(architecture)
    if cache.check_entry(folder) is None:
        return folder
    compiler, packages, machine = COMPILERS[architecture]
    if shutil.which(compiler) is None:
        raise CapabilityError(
            f"the core for {architecture}", compiler, "no such program",
            f"run: apt-get install {packages}",
        )  # fmt: skip
    tell(f"building the core for {architecture}")
    with cache.filled_entry(folder) as partial:
        _compile_core(compiler, machine, partial)
        _compile_loop(compiler, _loop(architecture), partial)
    return folder


def project_files(folder: Path) -> dict[str, bytes]:
    """Return the project's files for a host, by path relative to :data:`INSIDE`.

    :param folder: of :func:`build_core`
    """
    files = {f"kvmhost/{name}": path.read_bytes() for name, path in _python_files(_PACKAGE)}
    files[f"kvmhost/_core/{_MODULE}"] = (folder / _MODULE).read_bytes()
    files["loop.bin"] = (folder / _LOOP).read_bytes()
    return files


def _python_files(folder: Path, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Yield what the package consists of; folders that are links are followed."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name not in _LEFT_OUT:
                yield from _python_files(path, f"{prefix}{path.name}/")
        elif path.suffix in (".py", ".toml"):
            yield prefix + path.name, path


def _loop(architecture: str) -> Path:
    return _HERE / "loop" / _LOOPS[architecture]


def _compile_core(compiler: str, machine: str, folder: Path) -> None:
    build = runpy.run_path(str(_CORE / "build.py"))
    source = folder / "_native.c"
    build["make_ffi"](machine).emit_c_code(str(source))
    # Headers of this Python: with the stable ABI they do not depend on the architecture.
    include = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    _run(
        [
            *(compiler, *build["CFLAGS"], f"-DPy_LIMITED_API={_STABLE_ABI}"),
            *("-shared", "-fPIC", f"-I{_CORE}", *(f"-I{path}" for path in sorted(include))),
            *(str(source), *map(str, build["c_sources"](machine))),
            *("-o", str(folder / _MODULE)),
        ]
    )
    source.unlink()


def _compile_loop(compiler: str, source: Path, folder: Path) -> None:
    linked = folder / "loop.elf"
    _run([compiler, "-nostdlib", "-static", "-Wl,-Ttext=0,-e,0", "-o", str(linked), str(source)])
    objcopy = compiler.replace("gcc", "objcopy")
    _run([objcopy, "-O", "binary", "-j", ".text", str(linked), str(folder / _LOOP)])
    linked.unlink()


def _run(command: list[str]) -> None:
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        lines = [line for line in found.stderr.splitlines() if "error" in line]
        said = lines[0] if lines else found.stderr.strip()[-200:]
        raise CapabilityError(
            "the core for another architecture", command[0], said,
            "install the headers of that architecture, and Python's own",
        )  # fmt: skip
