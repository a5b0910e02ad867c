"""``kvmhost demo``: guest and limits in ``settings``, ``processes``, and the ``command``."""

from __future__ import annotations

from kvmhost.tools.demo.command import main, parser

__all__ = ["main", "parser"]
