"""Fixtures of the tests of commands."""

from __future__ import annotations

from terminals import terminal

__all__ = ["terminal"]
