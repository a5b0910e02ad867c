"""Temporary folders that Ctrl-C does not leave behind, whenever it is pressed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvmhost.signals import signals_deferred

__all__ = ["temporary_folder"]


@contextlib.contextmanager
def temporary_folder(prefix: str, beside: Path | None = None) -> Iterator[Path]:
    """Make a folder of mode 0700, and remove it with its contents after the body.

    :param prefix: first part of its name
    :param beside: the folder to make it in; None: ``TMPDIR``
    :raises OSError: if it cannot be made
    """
    folder = None
    try:
        with signals_deferred():
            folder = tempfile.TemporaryDirectory(prefix=prefix, dir=beside)
        yield Path(folder.name)
    finally:
        with signals_deferred():
            if folder is not None:
                folder.cleanup()
