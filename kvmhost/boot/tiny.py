"""A tiny guest in memory: image, parameters, task state segment and page tables."""

from __future__ import annotations

from collections.abc import Mapping

from kvmhost.boot.image import Image
from kvmhost.boot.longmode import lay_out_tables, write_tss
from kvmhost.boot.params import write_params
from kvmhost.memory.guest import GuestMemory
from kvmhost.memory.layout import TinyLayout

__all__ = ["load_tiny"]


def load_tiny(
    memory: GuestMemory, layout: TinyLayout, image: Image, n_vcpus: int, params: Mapping[str, int]
) -> None:
    """Write the initial memory of a tiny guest.

    :param params: a value for each parameter of the image
    :raises ImageError: if the image does not fit
    """
    image.load(memory, layout.tables_gpa)
    write_params(memory, layout, image, n_vcpus, params)
    write_tss(memory)
    lay_out_tables(memory, layout)
