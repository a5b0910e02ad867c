"""The only importer of the C core, and the one check of its return values.

C functions return ``-errno``. Python code calls ``lib`` through :func:`check`,
which turns that into an :class:`~kvmhost.errors.IoctlError`. cffi releases the
interpreter lock around every call.
"""

from __future__ import annotations

from typing import Any

from kvmhost._core._native import ffi, lib
from kvmhost.errors import IoctlError

__all__ = ["check", "ffi", "lib"]


def check(result: int, request: str, **arguments: Any) -> int:
    """Return a non-negative result; raise for ``-errno``.

    :param request: the name that the error shows
    :param arguments: what the error shows beside it
    :raises IoctlError: if ``result`` is negative
    """
    if result < 0:
        raise IoctlError(request, -result, arguments)
    return result
