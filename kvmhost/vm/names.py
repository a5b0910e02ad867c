"""The names that choose something, as types; a parser takes its choices from them."""

from __future__ import annotations

import typing
from typing import Any, Literal

from kvmhost.errors import LayoutError
from kvmhost.suggest import unknown_name

__all__ = ["DEFAULT_VIEW", "REARM", "TABLE_FORMATS", "Rearm", "TableFormat", "check_name"]

#: Pages to re-arm after a harvest.
Rearm = Literal["none", "young", "all", "sample"]
REARM: tuple[Rearm, ...] = typing.get_args(Rearm)

#: Where evicted pages go: the pager's own store, or the host's swap.
Actuator = Literal["store", "swap"]
ACTUATORS: tuple[Actuator, ...] = typing.get_args(Actuator)

#: Formats of model tables. ``tdp`` is ``npt``.
TableFormat = Literal["tdp", "npt", "ept", "stage2", "radix"]
TABLE_FORMATS: tuple[TableFormat, ...] = typing.get_args(TableFormat)


#: The view of everyone who names none.
DEFAULT_VIEW = "default"


def check_name(what: str, name: Any, known: typing.Iterable[str], field: str = "") -> None:
    """Check that a name is one of the known ones.

    :param what: kind of the name, such as ``tracker``
    :param field: the argument that holds it
    :raises LayoutError: if it is not; names the closest one
    """
    if name not in (names := tuple(known)):
        raise LayoutError(unknown_name(what, str(name), names), field=field)
