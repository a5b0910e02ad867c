"""``kvmhost accuracy``: its parts are in modules of their own, the command in ``command``."""

from __future__ import annotations

from kvmhost.tools.accuracy.command import AccuracySettings, main, parser, run
from kvmhost.tools.accuracy.kinds import KINDS, WORKLOADS

__all__ = ["KINDS", "WORKLOADS", "AccuracySettings", "main", "parser", "run"]
