"""Find the line of a TOML text on which the value of a key begins.

:mod:`tomllib` does not record lines. It has already parsed the text without an error, so
that quotes and brackets match, and each statement (a header, or a key with its value) can
be parsed again separately. The cost is linear in the length of the text.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["line_of", "outside_strings"]

#: Strings and comments, each up to its end or the end of the text; brackets; line ends.
_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?(?:"{3,5}|\Z)'
    r"|'''.*?(?:'{3,5}|\Z)"
    r'|"(?:\\.|[^"\\\n])*"?'
    r"|'[^'\n]*'?"
    r"|\#[^\n]*"
    r"|[\[{]|[\]}]|\n",
    re.DOTALL,
)


def line_of(text: str, keys: Sequence[str]) -> int:
    """Return the line number of a key, starting at 1; 0 if the text does not contain it.

    :param text: TOML that :mod:`tomllib` parses without an error
    :param keys: parts of the key, starting at the root table; empty: no line
    """
    table: tuple[str, ...] = ()
    if not keys:
        return 0
    for line, statement in _statements(text):
        read = tomllib.loads(statement)
        if statement.startswith("["):
            table = _only_path(read)
            if tuple(keys) == table[: len(keys)]:
                return line
        elif tuple(keys[: len(table)]) == table and _has(read, keys[len(table) :]):
            return line
    return 0


def outside_strings(text: str) -> str:
    """Return a TOML text without its strings and comments, with the same lines."""
    return _TOKEN.sub(lambda m: m[0] if len(m[0]) == 1 else "\n" * m[0].count("\n"), text)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Yield each statement with the number of its first line."""
    depth = start = 0
    line = first = 1
    for token in _TOKEN.finditer(text + "\n"):
        found = token[0]
        line += found.count("\n")
        if found in ("[", "{"):
            depth += 1
        elif found in ("]", "}"):
            depth -= 1
        elif found == "\n" and depth == 0:
            statement = text[start : token.start()].strip()
            if statement and not statement.startswith("#"):
                yield first, statement
            start, first = token.end(), line


def _only_path(read: dict[str, Any]) -> tuple[str, ...]:
    """Return the path of a table of which only the header was parsed."""
    path = []
    inside: Any = read
    while inside:
        if isinstance(inside, list):
            inside = inside[0]
            continue
        ((key, inside),) = inside.items()
        path.append(key)
    return tuple(path)


def _has(read: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(read, dict) or key not in read:
            return False
        read = read[key]
    return True
