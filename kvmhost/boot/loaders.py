"""Selects the loader of an image by its contents.

In this order: a multiboot header within the first 8 KiB; a PVH note; a 64-bit ELF, with or
without a parameter section: a tiny guest; a 32-bit ELF: entered directly. An ELF file
whose only boot header is one that no loader takes (Multiboot2, or Multiboot behind 8 KiB) is
refused. Flat binaries cannot be detected; the user names their loader.
"""

from __future__ import annotations

import struct
import typing
from pathlib import Path

from kvmhost.boot.elf import Elf, is_elf, parse_elf, read_file
from kvmhost.boot.image import PARAMS_SECTION, Image, Segment, parse_image
from kvmhost.errors import ImageError
from kvmhost.memory.layout import IMAGE_GPA
from kvmhost.vm.names import LOADERS, LoaderName, check_name

if typing.TYPE_CHECKING:
    from kvmhost.boot.pcboot import PcImage

__all__ = ["detect", "load_image"]

_LINUX_AT = 0x202  # "HdrS" in the setup header of the Linux boot protocol


def detect(path: str, data: bytes) -> str:
    """Return the loader's name.

    :raises ImageError: if no loader takes the file
    """
    from kvmhost.boot.multiboot import find_header, refuse_unsupported_header

    if find_header(data) is not None:
        return "multiboot"
    if not is_elf(data):
        if data[_LINUX_AT : _LINUX_AT + 4] == b"HdrS":
            problem = "a Linux bzImage, which no loader here takes; give vmlinux (PVH) instead"
            raise ImageError(path, "setup header", problem, _LINUX_AT)
        problem = "neither ELF nor a multiboot header; bare code needs --loader flat16, 32 or 64"
        raise ImageError(path, "e_ident", f"not an ELF file: {problem}", 0)
    elf = parse_elf(path, data)
    if _has_pvh_entry(elf):
        return "pvh"
    if elf.is_64 and elf.section(PARAMS_SECTION) is not None:
        return "tiny"
    refuse_unsupported_header(path, data)
    return "tiny" if elf.is_64 else "elf"


def _has_pvh_entry(elf: Elf) -> bool:
    """Return whether a PVH note can be read; damaged notes do not count."""
    from kvmhost.boot.pvh import find_entry

    try:
        return find_entry(elf) is not None
    except ImageError:
        return False


def load_image(path: Path, loader: LoaderName = "auto") -> Image | PcImage:
    """Read and check an image.

    :return: an :class:`Image` is for a tiny guest, anything else for a ``pc``
    :raises ImageError: if the file is damaged or not for that loader
    :raises LayoutError: for an unknown loader
    """
    check_name("loader", loader, LOADERS, "loader")
    data, name = read_file(path), str(path)
    try:
        return _load(name, data, detect(name, data) if loader == "auto" else loader)
    except ImageError:
        raise
    except (struct.error, ValueError, IndexError, OverflowError) as error:
        raise ImageError(name, "image", f"damaged: {error}") from error


def _load(name: str, data: bytes, loader: str) -> Image | PcImage:
    if loader == "tiny":
        return parse_image(name, data)
    if loader == "flat64":
        if not data:
            raise ImageError(name, "file", "empty", 0)
        return Image(name, IMAGE_GPA, (Segment(IMAGE_GPA, data, len(data), 0),), ())
    if loader == "multiboot":
        from kvmhost.boot.multiboot import parse_multiboot

        return parse_multiboot(name, data)
    if loader == "pvh":
        from kvmhost.boot.pvh import parse_pvh

        return parse_pvh(parse_elf(name, data))
    from kvmhost.boot.plain import parse_flat, parse_plain_elf

    return (
        parse_plain_elf(parse_elf(name, data))
        if loader == "elf"
        else parse_flat(name, data, loader)
    )
