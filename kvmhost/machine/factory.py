"""The choice between the kinds of machines, by image."""

from __future__ import annotations

import typing
from pathlib import Path

from kvmhost.boot.image import Image
from kvmhost.boot.loaders import load_image
from kvmhost.errors import LayoutError
from kvmhost.machine import tiny
from kvmhost.machine.base import BaseMachine
from kvmhost.vm.names import LoaderName

if typing.TYPE_CHECKING:
    from kvmhost.machine.pc import PcOptions

__all__ = ["make_machine"]


def make_machine(
    path: Path,
    *,
    loader: LoaderName = "auto",
    mem_bytes: int = 0,
    options: PcOptions | None = None,
    **common: typing.Any,
) -> BaseMachine:
    """Create the machine that an image needs.

    :param loader: one of :data:`kvmhost.vm.names.LOADERS`
    :param mem_bytes: guest memory; 0: the default of the kind
    :param options: options of a ``pc`` only; its command line begins with ``path``
    :param common: options of every kind, see :class:`~kvmhost.machine.base.BaseMachine`
    :raises ImageError: if the image cannot be used
    :raises LayoutError: if sizes, counts or parameters do not fit
    :raises CapabilityError: if the engine does not run on this host
    """
    image = load_image(path, loader)
    if isinstance(image, Image):
        if options is not None and options.given:
            raise LayoutError(f"{path} is a tiny guest: it takes no {options.given}")
        return tiny.Machine(image, mem_bytes=mem_bytes or tiny.DEFAULT_MEM_BYTES, **common)
    # Imported when needed: a tiny guest starts without the pc's devices.
    from kvmhost.machine import pc

    return pc.PcMachine(image, options, mem_bytes=mem_bytes or pc.DEFAULT_MEM_BYTES, **common)
