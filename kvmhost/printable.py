"""Escapes untrusted text for a terminal, so that it contains no control sequences.

Names, messages and fields of records, images, snapshots, file names, other processes and
plug-ins are printed on the user's terminal. A control character in one could
move the cursor, change the title, answer on standard input, or hide and reorder text
(escape sequences, C1 controls, bidirectional overrides, line separators); a newline
could forge a line of output. Each is shown as an escape, ``\\n`` or ``\\u202e``.
"""

from __future__ import annotations

__all__ = ["printable", "printable_lines"]

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: object) -> str:
    """Return text on one line, with control and invisible characters as escapes.

    Characters for which :meth:`str.isprintable` is true stay: letters of all scripts,
    digits, signs, emoji and the plain space. The escapes are those of JSON.
    """
    whole = str(text)
    if whole.isprintable():
        return whole
    return "".join(c if c.isprintable() else _escape(c) for c in whole)


def printable_lines(text: str) -> str:
    """As :func:`printable`, but newlines and tabs stay: for text of several lines."""
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(c if c in "\n\t" else printable(c) for c in text)


def _escape(char: str) -> str:
    if char in _SHORT:
        return _SHORT[char]
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
