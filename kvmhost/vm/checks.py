"""Checks of arguments that a machine and its client make alike, before anything is done."""

from __future__ import annotations

import re
import typing

from kvmhost.errors import LayoutError
from kvmhost.units import PAGE_BYTES

if typing.TYPE_CHECKING:
    from kvmhost.bitmap import Words

__all__ = [
    "check_gfns",
    "check_mask",
    "check_range",
    "check_resident_max",
    "check_view",
    "range_within",
]

_GFN_BITS = 52
_VIEW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")


def check_gfns(gfn_start: int, n_pages: int | None, *, least: int = 0) -> None:
    """Check a range of pages as far as that is possible without a VM.

    :param n_pages: None: to the end of memory
    :param least: the smallest number of pages
    :raises LayoutError: for a negative start, too few pages, or gfns of more than 52 bits
    """
    if gfn_start < 0 or gfn_start >> _GFN_BITS:
        raise LayoutError(f"no gfn: {gfn_start:#x}", field="gfn_start")
    if n_pages is not None and (n_pages < least or n_pages >> _GFN_BITS):
        raise LayoutError(
            f"{n_pages} pages from gfn {gfn_start:#x}: need at least {least}"
            if n_pages < least
            else f"{n_pages} pages from gfn {gfn_start:#x}: no VM has so many",
            field="n_pages",
        )


def range_within(gfn_start: int, n_pages: int | None, gfn_end: int) -> tuple[int, int]:
    """Return a range with its number of pages: by default, to the end of memory.

    :param gfn_end: the first gfn above all memory
    :raises LayoutError: if it ends beyond that
    """
    check_gfns(gfn_start, n_pages)
    if n_pages is None:
        n_pages = max(0, gfn_end - gfn_start)
    check_range(gfn_start, n_pages, gfn_end)
    return gfn_start, n_pages


def check_resident_max(resident_max_bytes: int) -> None:
    """Check a resident limit.

    :raises LayoutError: if it is negative, or less than a page and not 0
    """
    if resident_max_bytes < 0 or 0 < resident_max_bytes < PAGE_BYTES:
        raise LayoutError(
            f"a limit of {resident_max_bytes} bytes: need 0, for none, or a page of "
            f"{PAGE_BYTES} bytes at least",
            field="resident_max_bytes",
        )


def check_view(name: str) -> None:
    """Check the name of a view.

    :raises LayoutError: unless it is 1 to 32 letters, digits and ``._-``, a letter or digit first
    """
    if not _VIEW_NAME.fullmatch(name):
        raise LayoutError(
            f"view {name[:40]!r}: need up to 32 letters, digits, dots and dashes", field="view"
        )


def check_range(gfn_start: int, n_pages: int, gfn_end: int) -> None:
    """Check a range of a VM's gfns before anything is allocated for it.

    :param gfn_end: the first gfn above all memory
    :raises LayoutError: for a negative start or length, or an end beyond ``gfn_end``
    """
    if gfn_start < 0 or n_pages < 0:
        raise LayoutError(f"harvest: bad range of {n_pages} pages from gfn {gfn_start:#x}")
    if gfn_start + n_pages > gfn_end:
        raise LayoutError(
            f"{n_pages} pages from gfn {gfn_start:#x}: memory ends at gfn {gfn_end:#x}",
            field="n_pages" if gfn_start <= gfn_end else "gfn_start",
        )


def check_mask(mask: Words | None, n_pages: int) -> None:
    """Check that a mask has the size of a range.

    :raises LayoutError: for another shape than ``(ceil(n_pages / 64),)``, or another type
    """
    if mask is None:
        return
    shape, kind = getattr(mask, "shape", None), getattr(mask, "dtype", type(mask).__name__)
    if shape != ((n_pages + 63) // 64,) or kind != "uint64":
        raise LayoutError(
            f"harvest: mask of {kind}, shape {shape}: {n_pages} pages need "
            f"uint64, shape ({(n_pages + 63) // 64},)",
            field="mask",
        )
