"""What one kind of machine adds to a snapshot; light, since every machine imports it."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping

__all__ = ["MachineParts"]


@dataclasses.dataclass(frozen=True)
class MachineParts:
    """What a snapshot holds of one kind of machine, beside what all kinds have.

    :ivar append: arguments on the command line of a pc
    :ivar fw_cfg: files of fw_cfg, by name
    :ivar devices: state of the devices, by name, as JSON takes it
    """

    kind: typing.Literal["tiny", "pc"]
    append: str = ""
    fw_cfg: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    devices: Mapping[str, dict[str, typing.Any]] = dataclasses.field(default_factory=dict)
