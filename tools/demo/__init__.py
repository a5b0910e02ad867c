"""``kvmhost demo``: ``settings`` (guest and limits), ``processes`` and ``command``."""

from __future__ import annotations

from kvmhost.tools.demo.command import main, parser

__all__ = ["main", "parser"]
