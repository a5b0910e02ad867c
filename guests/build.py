"""Build the guest images from source with the compiler that the C core needs too.

``make guests`` or ``python -m guests.build``; the install does it as well.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

__all__ = ["GuestBuildError", "build_guests", "compile_guest"]

SOURCES = Path(__file__).resolve().parent / "x86_64"
CFLAGS = [
    "-std=gnu11", "-O2", "-m64", "-ffreestanding", "-nostdlib", "-static", "-fno-pie", "-no-pie",
    "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none",
    "-mno-red-zone", "-mgeneral-regs-only", "-fno-tree-loop-distribute-patterns",
    # The order of PARAM() lines is the order of the arguments.
    "-fno-toplevel-reorder",
    "-Wall", "-Wextra", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,max-page-size=4096",
]  # fmt: skip


class GuestBuildError(RuntimeError):
    """The compiler refused a guest source; its messages are the text."""


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
    compiler = shlex.split(os.environ.get("KVMHOST_GUEST_CC") or os.environ.get("CC") or "cc")
    linking = [f"-Wl,-T,{SOURCES / 'guest.ld'}", f"-I{SOURCES}", str(SOURCES / "start.S")]
    command = [*compiler, *CFLAGS, *linking, "-o", str(image), str(source)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise GuestBuildError(f"no compiler {compiler[0]!r}; install one or set CC") from error
    except subprocess.CalledProcessError as error:
        raise GuestBuildError(f"{source.name}: {error.stderr}") from error
    return image


if __name__ == "__main__":
    for built in build_guests():
        sys.stdout.write(f"{built}\n")
