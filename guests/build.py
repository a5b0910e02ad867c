"""Build the guest images from source with the compiler that the C core needs too.

``make guests`` or ``python -m kvmhost.guests.build``; the install does it as well.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from kvmhost.errors import KvmHostError

__all__ = [
    "CompilerMissingError",
    "GuestBuildError",
    "build_guests",
    "compile_guest",
    "compile_pc_guest",
    "pc_sources",
]

SOURCES = Path(__file__).resolve().parent / "x86_64"
PC_SOURCES = SOURCES / "pc"
CFLAGS = [
    "-std=gnu11", "-O2", "-m64", "-ffreestanding", "-nostdlib", "-static", "-fno-pie", "-no-pie",
    "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none",
    "-mno-red-zone", "-mgeneral-regs-only", "-fno-tree-loop-distribute-patterns",
    # The order of PARAM() lines is the order of the arguments.
    "-fno-toplevel-reorder",
    "-Wall", "-Wextra", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,max-page-size=4096",
]  # fmt: skip

PC_CFLAGS = [
    "-std=gnu11", "-O2", "-ffreestanding", "-nostdlib", "-static", "-fno-pie", "-no-pie",
    "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none",
    # Level-0 code is emulated where KVM shadows page tables: the plainest instructions.
    "-mgeneral-regs-only", "-fno-tree-loop-distribute-patterns", "-Wall", "-Wextra",
    "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,max-page-size=4096",
    f"-Wl,-T,{PC_SOURCES / 'pc.ld'}",
]  # fmt: skip


class GuestBuildError(KvmHostError, RuntimeError):
    """The compiler refused a guest source; its messages are the text."""


class CompilerMissingError(GuestBuildError):
    """The compiler, or another program of the tool chain, is not installed."""


def build_guests(target: Path = SOURCES) -> list[Path]:
    """Compile every guest source into ``target`` as an ELF image.

    :param target: folder for the images
    :return: the images, sorted by name
    :raises GuestBuildError: if the compiler fails or is missing
    """
    target.mkdir(parents=True, exist_ok=True)
    return [
        compile_guest(source, target / f"{source.stem}.elf")
        for source in sorted(SOURCES.glob("*.c"))
    ]


def compile_guest(source: Path, image: Path) -> Path:
    """Compile one C source, which includes ``guest.h``, into an image.

    The compiler is ``$KVMHOST_GUEST_CC``, else ``$CC``, else ``cc``.

    :return: ``image``
    :raises GuestBuildError: if the compiler fails or is missing
    """
    linking = [f"-Wl,-T,{SOURCES / 'guest.ld'}", f"-I{SOURCES}", str(SOURCES / "start.S")]
    _run([*_compiler(), *CFLAGS, *linking, "-o", str(image), str(source)], source.name)
    return image


def pc_sources() -> list[Path]:
    """Return the sources of the pc guests, one an image, sorted by name."""
    sources = [path for path in PC_SOURCES.glob("*.[cS]") if path.name != "start.S"]
    return sorted(sources)


def compile_pc_guest(source: Path, image: Path) -> Path:
    """Compile one source of a multiboot image.

    A C source becomes a 32-bit ELF file, or bare bytes with a header that carries the
    addresses if the image is named ``.flat``. An assembly source becomes a 64-bit
    program in a 32-bit ELF file.

    :return: ``image``
    :raises GuestBuildError: if compiler or objcopy fail or are missing
    """
    flat = image.suffix == ".flat"
    if source.suffix == ".S":
        words = ["-m64", str(source)]
    else:
        words = ["-m32", "-march=i686", f"-I{PC_SOURCES}", str(PC_SOURCES / "start.S")]
        words += [str(source), *(["-DFLAT"] if flat else [])]
    _run([*_compiler(), *PC_CFLAGS, *words, "-o", str(image)], source.name)
    if source.suffix == ".S":
        _run(["objcopy", "-O", "elf32-i386", str(image)], source.name)
    elif flat:
        _run(["objcopy", "-O", "binary", str(image)], source.name)
    return image


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("KVMHOST_GUEST_CC") or os.environ.get("CC") or "cc")


def _run(command: list[str], source: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise CompilerMissingError(f"no program {command[0]!r}; install one or set CC") from error
    except subprocess.CalledProcessError as error:
        raise GuestBuildError(f"{source}: {error.stderr}") from error


if __name__ == "__main__":
    for built in build_guests():
        sys.stdout.write(f"{built}\n")
