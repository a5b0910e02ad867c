"""The names that choose something, as types; a parser takes its choices from them."""

from __future__ import annotations

import typing
from typing import Any, Literal

from kvmhost.errors import LayoutError
from kvmhost.suggest import unknown_name

__all__ = [
    "ACCESS",
    "ACTUATORS",
    "CODECS",
    "DEFAULT_VIEW",
    "ENGINES",
    "LOADERS",
    "METHODS",
    "NOT_SEEN",
    "REARM",
    "SHARED_SWEEP",
    "TABLE_FORMATS",
    "TRACKERS",
    "Access",
    "Actuator",
    "CodecName",
    "EngineName",
    "LoaderName",
    "MethodName",
    "Rearm",
    "TableFormat",
    "TrackerName",
    "check_name",
]

#: Pages to re-arm after a harvest.
Rearm = Literal["none", "young", "all", "sample"]
REARM: tuple[Rearm, ...] = typing.get_args(Rearm)

#: What runs the vCPUs; ``auto`` is ``kvm`` where that works.
EngineName = Literal["auto", "kvm", "emulated"]
ENGINES: tuple[EngineName, ...] = typing.get_args(EngineName)

#: How an image is loaded; ``auto`` inspects it.
LoaderName = Literal["auto", "tiny", "multiboot", "pvh", "elf", "flat16", "flat32", "flat64"]
LOADERS: tuple[LoaderName, ...] = typing.get_args(LoaderName)

#: What compresses evicted pages; ``auto`` is the first that is installed.
CodecName = Literal["auto", "lz4", "zstd", "none"]
CODECS: tuple[CodecName, ...] = typing.get_args(CodecName)

#: Where young bits of a VM come from; ``auto`` keeps the one in use.
TrackerName = Literal["auto", "guestpt", "pagemap", "dirty", "uffd", "idle"]
TRACKERS: tuple[TrackerName, ...] = typing.get_args(TrackerName)

#: Where young bits of another process come from.
MethodName = Literal["auto", "idle", "pageout", "written", "soft-dirty", "present"]
METHODS: tuple[MethodName, ...] = typing.get_args(MethodName)

#: What the bits of a tracker, or of a way to look at another process, do not show.
NOT_SEEN = {
    "dirty": "reads",
    "written": "reads",
    "soft-dirty": "reads",
    "present": "touches after the first",
}

#: What the host mapping of guest memory permits; ``write`` includes reads.
Access = Literal["none", "read", "write"]
ACCESS: tuple[Access, ...] = typing.get_args(Access)

#: Where evicted pages go: the pager's own store, or the host's swap.
Actuator = Literal["store", "swap"]
ACTUATORS: tuple[Actuator, ...] = typing.get_args(Actuator)

#: Formats of model tables. ``tdp`` is ``npt``.
TableFormat = Literal["tdp", "npt", "ept", "stage2", "radix"]
TABLE_FORMATS: tuple[TableFormat, ...] = typing.get_args(TableFormat)


#: The view of everyone who names none.
DEFAULT_VIEW = "default"
#: Share of its interval by which a periodic reader lets its window end earlier, with the sweep
#: of another reader.
SHARED_SWEEP = 0.25


def check_name(what: str, name: Any, known: typing.Iterable[str], field: str = "") -> None:
    """Check that a name is one of the known ones.

    :param what: kind of the name, such as ``tracker``
    :param field: the argument that holds it
    :raises LayoutError: if it is not; names the closest one
    """
    if name not in (names := tuple(known)):
        raise LayoutError(unknown_name(what, str(name), names), field=field)
