"""Exchange formats by name. A new format is one module of this package and an entry here."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvmhost.errors import LayoutError
from kvmhost.files import replacing
from kvmhost.reclaim.exchange.common import Imported
from kvmhost.reclaim.record.reader import YoungRecord

__all__ = ["EXPORTS", "IMPORTS", "ExchangeFormat", "export", "read"]


@dataclasses.dataclass(frozen=True)
class ExchangeFormat:
    """One format in one direction.

    :param about: one-line description
    :param target: ``module:function`` in this package. An exporter takes the record, a
        binary file (a path if ``is_directory``), the first and the end window, and
        ``options``, and returns the number of gfns if it writes a list of them. An importer
        takes a path, or all paths if it ``reads_many``, and ``options``.
    :param options: arguments of the function that are fixed by the format
    :param takes: names of the options that the caller may pass
    """

    about: str
    target: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    takes: tuple[str, ...] = ()
    is_directory: bool = False
    reads_many: bool = False

    def call(self, *arguments: Any, **options: Any) -> Any:
        """Call the function with the options that it takes."""
        module, _, name = self.target.partition(":")
        function = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        given = {key: value for key, value in options.items() if key in self.takes}
        return function(*arguments, **self.options, **given)


EXPORTS = {
    "damon": ExchangeFormat(
        "DAMON's record as damo writes it: damo report access --input OUT",
        "damon:export",
        {"compress": True},
    ),
    "damon-json": ExchangeFormat("the same as plain JSON", "damon:export"),
    "dirty": ExchangeFormat(
        "a directory of KVM dirty bitmaps with an index", "dirty:export", is_directory=True
    ),
    "ranges": ExchangeFormat("plain text: ranges of gfns by window", "text:export_ranges"),
    "record": ExchangeFormat(
        "a record of the current format: of an older record, or of some windows",
        "copy:export",
        is_directory=True,
    ),
    "gfns": ExchangeFormat(
        "the working set as a list, most often young pages first: for prefetch",
        "text:export_working_set",
        takes=("min_share",),
    ),
    "gfns-bin": ExchangeFormat(
        "the same as little-endian 64-bit numbers",
        "text:export_working_set",
        {"binary": True},
        takes=("min_share",),
    ),
}
IMPORTS = {
    "damon": ExchangeFormat(
        "DAMON's record: JSON, or JSON in a zlib stream",
        "damon:read",
        takes=("target_id", "gfn_range"),
    ),
    "dirty": ExchangeFormat(
        "KVM dirty bitmaps: a directory with an index, or one file per window",
        "dirty:read_any",
        takes=("gfn_start", "n_pages", "interval_s"),
        reads_many=True,
    ),
    "ranges": ExchangeFormat(
        "plain text: ranges of gfns by window, or a list of gfns", "text:read"
    ),
}


def export(
    name: str, record: YoungRecord, out: Path, first: int, end: int, **options: Any
) -> int | None:
    """Write windows ``[first, end)``; return the number of gfns listed, or None for windows.

    :raises OSError: if the output cannot be written
    """
    known = EXPORTS[name]
    n_gfns: int | None
    if known.is_directory:
        n_gfns = known.call(record, out, first, end, **options)
    else:
        with replacing(out) as file:
            n_gfns = known.call(record, file, first, end, **options)
    return n_gfns


def read(name: str, paths: Sequence[Path], **options: Any) -> Imported:
    """Read files of a format.

    :raises LayoutError: if the format reads one file and several are given
    :raises RecordError: if a file is damaged
    """
    known = IMPORTS[name]
    if len(paths) > 1 and not known.reads_many:
        raise LayoutError(f"{name}: one file makes a record, {len(paths)} were given")
    found: Imported = known.call(paths if known.reads_many else paths[0], **options)
    return found
