"""Kinds of pictures by suffix. A new kind is one module of this package and an entry here."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmhost.errors import LayoutError

if TYPE_CHECKING:
    from kvmhost.reclaim.draw.heatmapdata import RecordView

__all__ = ["PICTURES", "PictureKind", "draw_record", "kind_of"]


@dataclasses.dataclass(frozen=True)
class PictureKind:
    """One kind of picture. Functions are given as ``module:function`` in this package.

    :param about: one line for users
    :param record: draws a view of a record; takes the view, a path and options, and
        returns a line about the picture
    :param check: raises CapabilityError if this kind cannot be drawn; None if it always can
    :param takes: names of options that ``record`` takes
    """

    about: str
    record: str
    check: str | None = None
    takes: tuple[str, ...] = ()

    def check_available(self) -> None:
        """Check that this kind can be drawn.

        :raises CapabilityError: if a library is missing
        """
        if self.check is not None:
            _function(self.check)()


def _plotted(about: str) -> PictureKind:
    return PictureKind(
        about,
        "render:draw_record",
        check="render:need_plotting",
        takes=("n_bins",),
    )


PICTURES = {
    ".png": _plotted("an image"),
    ".svg": _plotted("a vector graphic"),
    ".pdf": _plotted("a document"),
    ".html": PictureKind(
        "a page that zooms down to single gfns", "heatmaphtml:draw_record", takes=("max_bytes",)
    ),
}


def kind_of(path: Path) -> PictureKind:
    """Return the kind of picture of a path, by its suffix.

    :raises LayoutError: if there is no such kind
    """
    kind = PICTURES.get(path.suffix.lower())
    if kind is None:
        raise LayoutError(f"{path}: the name must end in {' or '.join(PICTURES)}")
    return kind


def draw_record(view: RecordView, path: Path, **options: Any) -> str:
    """Draw a view of a record; return a line about the picture.

    :param options: of all kinds; each kind uses those that it takes
    :raises LayoutError: if there is no such kind of picture
    :raises CapabilityError: if a library is missing
    :raises HostError: if the file cannot be written
    """
    kind = kind_of(path)
    given = {name: value for name, value in options.items() if name in kind.takes}
    drawn: str = _function(kind.record)(view, path, **given)
    return drawn


def _function(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)
