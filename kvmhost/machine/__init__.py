"""Kinds of machines, and the choice between them by image.

======  ====================================================================
kind    for
======  ====================================================================
tiny    guests that enter in 64-bit mode at privilege level 3
pc      images of others: multiboot, PVH, ELF, bare code, at privilege level 0
======  ====================================================================
"""

from __future__ import annotations

import typing
from pathlib import Path

from kvmhost.boot.image import Image
from kvmhost.boot.loaders import load_image
from kvmhost.errors import LayoutError
from kvmhost.machine.base import Machine

if typing.TYPE_CHECKING:
    from kvmhost.machine.pc import PcOptions

__all__ = ["make_machine"]

TINY_MEM_BYTES, PC_MEM_BYTES = 64 << 20, 128 << 20


def make_machine(
    path: Path,
    *,
    loader: str = "auto",
    mem_bytes: int = 0,
    options: PcOptions | None = None,
    **common: typing.Any,
) -> Machine:
    """Make the machine that an image needs.

    :param loader: one of :data:`kvmhost.boot.loaders.LOADERS`
    :param mem_bytes: guest memory; 0: what this kind usually has
    :param options: what only a ``pc`` takes; its command line begins with ``path``
    :param common: what every :class:`~kvmhost.machine.base.Machine` takes
    :raises ImageError: if the image cannot be used
    :raises LayoutError: if sizes, counts or parameters do not fit
    :raises CapabilityError: if the engine is not to be had
    """
    image = load_image(path, loader)
    if isinstance(image, Image):
        if options is not None and options.given:
            raise LayoutError(f"{path} is a tiny guest: it takes no {options.given}")
        return Machine(image, mem_bytes=mem_bytes or TINY_MEM_BYTES, **common)
    from kvmhost.machine.pc import PcMachine

    return PcMachine(image, options, mem_bytes=mem_bytes or PC_MEM_BYTES, **common)
