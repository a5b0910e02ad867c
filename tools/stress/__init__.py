"""``kvmhost stress``: ``machine``, ``phases``, ``reference``, ``against``, ``command``."""

from __future__ import annotations

from kvmhost.tools.stress.command import main, parser

__all__ = ["main", "parser"]
