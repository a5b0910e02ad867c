"""Guest images: 64-bit x86 ELF executables that describe their own parameters.

An image may carry a section ``.kvmhost.params``: one NUL-terminated line per
parameter, ``name=default;description`` or ``name=default unit;description``, where the unit
is ``pages``, ``permille`` or ``percent``. Line ``i`` names argument ``i`` of the
parameter page (see :mod:`kvmhost.boot.params`).

Files are untrusted: any defect raises an
:class:`~kvmhost.errors.ImageError` that names file, field and offset.
"""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Literal, cast, get_args

from kvmhost.boot.elf import (
    EM_X86_64,
    ET_EXEC,
    MAX_IMAGE_BYTES,
    Elf,
    is_elf,
    parse_elf,
    read_file,
)
from kvmhost.errors import ImageError, LayoutError
from kvmhost.memory.guest import GuestMemory
from kvmhost.memory.layout import IMAGE_GPA
from kvmhost.units import PAGE_BYTES, Bytes, Share

__all__ = [
    "MAX_IMAGE_BYTES",
    "PARAMS_SECTION",
    "PARTS_OF_ONE",
    "Image",
    "Param",
    "Segment",
    "Unit",
    "parse_image",
    "read_image",
]

PARAMS_SECTION = ".kvmhost.params"
MAX_PARAMS = 64
#: Units of a parameter that is a share, and how many of each are the whole.
PARTS_OF_ONE = {"permille": 1000, "percent": 100}
Unit = Literal["", "pages", "permille", "percent"]
UNITS = get_args(Unit)
#: What a share may be off by, since it is a binary fraction.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Param:
    """One named argument of a guest; values are unsigned 64-bit numbers.

    :ivar unit: of the value: ``pages``, ``permille`` or ``percent``; empty for a plain number
    """

    name: str
    default: int
    help: str
    unit: Unit = ""

    def parse(self, text: str) -> int:
        """Read a value as text: a number in the parameter's unit, decimal or hex with ``0x``.

        A parameter in pages also takes a size (``64M``), one in ‰ or % a share (``1/4``, ``25%``).

        :raises LayoutError: for anything else
        """
        try:
            return int(text[:64], 0)
        except ValueError:
            pass
        try:
            value = self._amount(text)
        except ValueError as error:
            raise LayoutError(f"parameter {self.name}: {error}") from None
        if abs(value - round(value)) > _ROUNDING:
            raise LayoutError(f"parameter {self.name}: {text!r} is no whole number of {self.unit}")
        return round(value)

    def _amount(self, text: str) -> float:
        if self.unit == "pages":
            return Bytes.parse(text) / PAGE_BYTES
        if self.unit in PARTS_OF_ONE:
            return Share.parse(text) * PARTS_OF_ONE[self.unit]
        raise ValueError(f"{text[:64]!r}: need a number")


@dataclasses.dataclass(frozen=True)
class Segment:
    """Bytes to load at a gpa; ``mem_bytes`` beyond the data are zero."""

    gpa: int
    data: bytes
    mem_bytes: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Image:
    """A parsed image."""

    path: str
    entry: int
    segments: tuple[Segment, ...]
    params: tuple[Param, ...]
    #: Requests of the image that are not met: a tiny guest makes none.
    remarks: tuple[str, ...] = ()

    @property
    def end(self) -> int:
        """First gpa after the loaded image."""
        return max(segment.gpa + segment.mem_bytes for segment in self.segments)

    def load(self, memory: GuestMemory, limit_gpa: int) -> None:
        """Copy the segments into guest memory.

        :param limit_gpa: the highest gpa at which the image may end
        :raises ImageError: if a segment does not fit
        """
        for segment in self.segments:
            end = segment.gpa + segment.mem_bytes
            if segment.gpa < IMAGE_GPA or end > limit_gpa:
                raise ImageError(
                    self.path,
                    "p_paddr",
                    f"segment [{segment.gpa:#x}, {end:#x}) is not inside "
                    f"[{IMAGE_GPA:#x}, {limit_gpa:#x}); give the guest more memory",
                    segment.offset,
                )
            try:
                memory[segment.gpa : segment.gpa + len(segment.data)] = segment.data
            except LayoutError as error:
                raise ImageError(self.path, "p_paddr", str(error), segment.offset) from error


def read_image(path: Path) -> Image:
    """Read and check an image.

    :raises ImageError: if the file is absent, truncated, no such ELF, or inconsistent
    """
    return parse_image(str(path), read_file(path))


def parse_image(path: str, data: bytes) -> Image:
    """Check an image that has been read.

    :raises ImageError: if it is truncated, no such ELF, or inconsistent
    """
    try:
        return _parse(path, data)
    except ImageError:
        raise
    except (struct.error, ValueError, IndexError, OverflowError) as error:
        raise ImageError(path, "ELF", f"damaged: {error}") from error


def _parse(path: str, data: bytes) -> Image:
    # Importing pyelftools takes as long as a whole guest run: the header checks avoid it.
    if is_elf(data) and data[4:5] != b"\2":
        raise ImageError(path, "e_ident", "need a 64-bit little-endian ELF", 4)
    elf = parse_elf(path, data)
    if elf.machine != EM_X86_64:
        raise ImageError(path, "e_machine", f"{elf.machine}, need {EM_X86_64} (x86-64)", 18)
    if elf.kind != ET_EXEC:
        problem = f"{elf.kind}, need {ET_EXEC} (fixed-address executable)"
        raise ImageError(path, "e_type", problem, 16)
    segments = tuple(
        Segment(phdr.paddr, elf.contents(phdr), phdr.memsz, phdr.at) for phdr in elf.loads()
    )
    if not segments:
        raise ImageError(path, "Phdr", "nothing to load", elf.phdrs[0].at)
    if not any(s.gpa <= elf.entry < s.gpa + len(s.data) for s in segments):
        raise ImageError(path, "e_entry", f"{elf.entry:#x} is in no loaded segment", 24)
    return Image(path, elf.entry, segments, _params(elf))


def _params(elf: Elf) -> tuple[Param, ...]:
    found = elf.section(PARAMS_SECTION)
    return _parse_params(elf.path, *found) if found else ()


def _parse_params(path: str, offset: int, raw: bytes) -> tuple[Param, ...]:
    params = []
    for line in raw.decode("utf-8").split("\0"):
        if not line:
            continue
        name, equals, rest = line.partition("=")
        value, _, text = rest.partition(";")
        default, _, unit = value.partition(" ")
        if not equals or not name.isidentifier() or not default.isdecimal():
            raise ImageError(path, PARAMS_SECTION, f"line {line!r}: need name=number;help", offset)
        if unit not in UNITS:
            raise ImageError(path, PARAMS_SECTION, f"{name}: unknown unit {unit!r}", offset)
        if int(default) >> 64:
            raise ImageError(path, PARAMS_SECTION, f"{name}: default is over 64 bits", offset)
        params.append(Param(name, int(default), text.strip(), cast(Unit, unit)))
    if len(params) > MAX_PARAMS:
        raise ImageError(path, PARAMS_SECTION, f"{len(params)} lines, at most {MAX_PARAMS}", offset)
    if len({param.name for param in params}) < len(params):
        raise ImageError(path, PARAMS_SECTION, "a name stands there twice", offset)
    return tuple(params)
