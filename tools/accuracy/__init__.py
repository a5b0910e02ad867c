"""``kvmhost accuracy``: the command is in ``command``, its parts are in the other modules."""

from __future__ import annotations

from kvmhost.tools.accuracy.command import AccuracySettings, main, parser, run
from kvmhost.tools.accuracy.kinds import KINDS, WORKLOADS

__all__ = ["KINDS", "WORKLOADS", "AccuracySettings", "main", "parser", "run"]
