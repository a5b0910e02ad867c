"""Checks a command's JSON output against the tables of docs/json.md, key by key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvmhost.tools.outputs.describe import Row
from kvmhost.tools.outputs.page import parse

PAGE = Path(__file__).resolve().parents[2] / "docs" / "json.md"

_TYPES = {
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "scalar": lambda v: isinstance(v, int | float | str),
    "pair": lambda v: [type(n) for n in v] == [int, int],
    "anything": lambda v: True,
}


def checked(command: str, text: str) -> list[dict[str, Any]]:
    """Return the objects that a command printed, checked against its section of the page."""
    return checked_lines(f"kvmhost {command}", text)


def checked_lines(heading: str, text: str) -> list[dict[str, Any]]:
    rows = parse(PAGE.read_text())[heading]
    assert text.isascii()
    assert text.endswith("\n")
    found = [json.loads(line, parse_constant=_refuse) for line in text.splitlines()]
    for one in found:
        assert list(problems(one, rows)) == []
    return found


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def problems(document: dict[str, Any], rows: list[Row]) -> Iterator[str]:
    """Yield what an object has and the tables lack, what it lacks, and wrong types."""
    kinds = {row.path: row.kind for row in rows}
    yield from _problems(document, "", kinds)


def _problems(found: dict[str, Any], prefix: str, kinds: dict[str, str]) -> Iterator[str]:
    known = {path for path in kinds if re.fullmatch(re.escape(prefix) + r"[^.]+", path)}
    there = {prefix + name for name in found}
    yield from (f"{path}: not on the page" for path in sorted(there - known))
    yield from (f"{path}: missing" for path in sorted(known - there))
    for path in sorted(there & known):
        yield from _value(found[path.removeprefix(prefix)], kinds[path], path, path, kinds)


def _value(value: Any, kind: str, path: str, key: str, kinds: dict[str, str]) -> Iterator[str]:
    """Yield the problems of a value; ``key`` is the path in the tables."""
    nullable = kind.endswith(" or null")
    kind = kind.removesuffix(" or null") if nullable else kind
    if value is None and nullable:
        return
    if kind.startswith('"'):
        if f'"{value}"' not in kind.split(" or "):
            yield f"{path}: {value!r} is not one of {kind}"
    elif kind.startswith("array of "):
        yield from _many(value, list, kind.removeprefix("array of "), path, key + "[]", kinds)
    elif kind.startswith("map of "):
        yield from _many(value, dict, kind.removeprefix("map of "), path, key + ".*", kinds)
    elif kind == "object":
        if isinstance(value, dict):
            yield from _problems(value, key + ".", kinds)
        else:
            yield f"{path}: {value!r} is not an object"
    elif not _TYPES[kind](value):
        yield f"{path}: {value!r} is not: {kind}"


def _many(
    value: Any, whole: type, kind: str, path: str, key: str, kinds: dict[str, str]
) -> Iterator[str]:
    if not isinstance(value, whole):
        yield f"{path}: {value!r} is not a {whole.__name__}"
        return
    for part in value.values() if isinstance(value, dict) else value:
        yield from _value(part, kind, path, key, kinds)
