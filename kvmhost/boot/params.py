"""The parameter page: arguments from the host to a tiny guest, and its results.

At gpa 0x1000, little-endian; guests/x86_64/guest.h has the same in C::

    0x000  u64  magic "kvmhost1"
    0x008  u64  number of vCPUs
    0x010  u64  free memory: start gpa
    0x018  u64  free memory: end gpa
    0x020  u64  start gpa of the MMIO window
    0x040  u64  arguments, 64 of them, in the order of the image's parameter section
    0x400  results, 64 bytes per vCPU: status, gfn, epoch, expected, found, word, touches, spare
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping

from kvmhost.boot.image import Image
from kvmhost.errors import LayoutError
from kvmhost.memory.guest import GuestMemory
from kvmhost.memory.layout import MMIO_GPA, PARAMS_GPA, TinyLayout
from kvmhost.units import PAGE_BYTES

__all__ = ["GuestResult", "read_result", "resolve_params", "write_params"]

MAGIC = int.from_bytes(b"kvmhost1", "little")
ARGS_OFFSET = 0x40
RESULTS_OFFSET = 0x400
RESULT_BYTES = 64

_U64_MAX = (1 << 64) - 1


@dataclasses.dataclass(frozen=True)
class GuestResult:
    """The result of a vCPU in its slot of the parameter page.

    :param epoch: the current epoch, or the last one that it finished
    :param word: index in the page of the word that was ``found`` and not ``expected``
    :param touches: pages touched so far; counts up while the guest runs
    """

    status: int
    gfn: int
    epoch: int
    expected: int
    found: int
    word: int
    touches: int


def resolve_params(image: Image, given: Mapping[str, int | str]) -> dict[str, int]:
    """Return all parameters of an image: its defaults, overridden by the given values.

    :param given: numbers in the unit of the parameter, or text for :meth:`Param.parse`
    :raises LayoutError: for a name that the image does not have, or a value that the
        parameter does not take, or that is outside ``[0, 2**64)``
    """
    params = {param.name: param for param in image.params}
    values = {param.name: param.default for param in image.params}
    for name, text in given.items():
        if name not in values:
            known = ", ".join(values) or "none"
            raise LayoutError(f"{image.path} has no parameter {name!r}; it has: {known}")
        value = params[name].parse(text) if isinstance(text, str) else text
        if not 0 <= value <= _U64_MAX:
            raise LayoutError(f"parameter {name}={value} is outside [0, 2**64)")
        values[name] = value
    return values


def write_params(
    memory: GuestMemory,
    layout: TinyLayout,
    image: Image,
    n_vcpus: int,
    values: Mapping[str, int],
) -> None:
    """Fill the parameter page."""
    start, end = layout.free_range
    if start <= image.end < end:
        start = -(-image.end // PAGE_BYTES) * PAGE_BYTES
    head = struct.pack("<5Q", MAGIC, n_vcpus, start, end, MMIO_GPA)
    args = struct.pack(f"<{len(values)}Q", *values.values())
    memory[PARAMS_GPA : PARAMS_GPA + len(head)] = head
    at = PARAMS_GPA + ARGS_OFFSET
    memory[at : at + len(args)] = args


def read_result(memory: GuestMemory, vcpu: int) -> GuestResult:
    """Read what vCPU ``vcpu`` reported."""
    at = PARAMS_GPA + RESULTS_OFFSET + vcpu * RESULT_BYTES
    return GuestResult(*struct.unpack("<7Q", memory[at : at + 56]))
