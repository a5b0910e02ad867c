"""Describe a structure as rows, key by key: path, type, unit, meaning.

Paths are as in jq: ``vcpus[].epoch`` for what is in an array, ``params.*`` for a map whose
keys are not fixed. Meanings are the docstrings under the fields of a structure; units
follow from the names.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

import msgspec

__all__ = ["DIMENSIONLESS", "Row", "meanings", "rows_of", "unit_of"]

#: Units by the last word of a key.
_UNITS = {
    "bytes": "bytes",
    "kib": "KiB",
    "mib": "MiB",
    "gib": "GiB",
    "pages": "pages",
    "windows": "windows",
    "passes": "passes",
    "s": "s",
    "ms": "ms",
    "us": "µs",
    "ns": "ns",
    "share": "0 to 1",
    "fraction": "0 to 1",
    "ratio": "1",
    "percent": "%",
    "gfn": "gfn",
    "gpa": "address",
    "hva": "address",
}

#: Units that are shown with what they are per; a share or a number is only "per minute".
_OF_RATES = {"bytes", "MiB", "s", "ms", "ns", "%"}

#: Numbers of what the key names.
_COUNTS = {
    "doorbells",
    "epochs",
    "errors",
    "evictions",
    "exits",
    "faults",
    "fills",
    "kills",
    "harvests",
    "pieces",
    "promotions",
    "records",
    "rounds",
    "refaults",
    "samples",
    "sweeps",
    "touches",
    "vcpus",
    "waits",
    "wakes",
}
_COUNTED = {
    "disk_full": "evictions",
    "fault_ins": "pages",
    "outcomes": "pages",
    "over_limit": "faults",
}

#: Numbers that are names, positions or codes and have no unit.
DIMENSIONLESS = {
    "caps",
    "default",
    "first_window",
    "first_young_window",
    "last_young_window",
    "action_pass",
    "errno",
    "daemon_status",
    "exit_code",
    "number",
    "pause_number",
    "pid",
    "seq",
    "slot",
    "status",
    "uid",
    "version",
    "window",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One key of an output.

    :ivar path: where it is, such as ``vcpus[].epoch``
    :ivar kind: its type, such as ``integer or null``
    :ivar unit: empty for what has none
    """

    path: str
    kind: str
    unit: str
    meaning: str


def rows_of(structure: type[msgspec.Struct], prefix: str = "") -> Iterator[Row]:
    """Iterate over the keys of a structure, each before the keys inside it.

    :raises KeyError: for a field without a docstring
    """
    hints = typing.get_type_hints(structure)
    for name in structure.__struct_fields__:
        kind, suffix, inner = _describe(hints[name])
        meaning = meanings(structure)[name]
        yield Row(prefix + name, kind, unit_of(name, kind), meaning)
        if inner is not None:
            yield from rows_of(inner, f"{prefix}{name}{suffix}.")


def unit_of(name: str, kind: str) -> str:
    """Return the unit of a number, which follows from its name; empty for everything else."""
    if "integer" not in kind and "number" not in kind:
        return ""
    if name.startswith("n_"):
        return name.removeprefix("n_").replace("_", " ")
    if name.startswith("gfn"):
        return "gfn"
    if "_per_" in name:
        head, _, per = name.partition("_per_")
        unit = _UNITS.get(head.rpartition("_")[2], "")
        per = _UNITS.get(per, per.replace("_", " "))
        return f"{unit} per {per}" if unit in _OF_RATES else f"per {per}"
    last = name.rpartition("_")[2]
    if last in _COUNTS:
        return last
    return _COUNTED.get(name, "") or _UNITS.get(last, "")


@functools.cache
def meanings(structure: type) -> dict[str, str]:
    """Return the docstrings under the fields of a class and of its bases, by field."""
    found: dict[str, str] = {}
    for base in reversed(structure.__mro__):
        if base is not msgspec.Struct and issubclass(base, msgspec.Struct):
            found |= _own_meanings(base)
    return found


def _own_meanings(structure: type) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(structure))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = after.value if isinstance(after, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[node.target.id] = " ".join(text.value.split())
    return found


_SIMPLE = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    bytes: "string",
    int | float | str: "scalar",
    tuple[int, int]: "pair",
    Any: "anything",
}


def _describe(hint: Any) -> tuple[str, str, type[msgspec.Struct] | None]:
    """Return the words for a type, what follows its name in a path, and the structure in it."""
    if hint in _SIMPLE:
        return _SIMPLE[hint], "", None
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _describe(parts[0])
    if origin in (types.UnionType, typing.Union):
        (part,) = (part for part in parts if part is not type(None))
        kind, suffix, inner = _describe(part)
        return f"{kind} or null", suffix, inner
    if origin is list:
        kind, suffix, inner = _describe(parts[0])
        return f"array of {kind}", f"[]{suffix}", inner
    if origin is dict:
        kind, suffix, inner = _describe(parts[1])
        return f"map of {kind}", f".*{suffix}", inner
    if origin is typing.Literal:
        return " or ".join(f'"{part}"' for part in parts), "", None
    if issubclass(hint, enum.StrEnum):
        return " or ".join(f'"{part.value}"' for part in hint), "", None
    assert issubclass(hint, msgspec.Struct), hint
    return "object", "", hint
