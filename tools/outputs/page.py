"""Write docs/json.md: every command with ``--json``, and every key of its output.

``python -m kvmhost.tools.outputs.page >docs/json.md`` makes the page again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import msgspec

from kvmhost.tools.outputs.base import ErrorOutput
from kvmhost.tools.outputs.describe import Row, rows_of
from kvmhost.tools.outputs.registry import OUTPUTS, WITHOUT_JSON

__all__ = ["page", "parse"]

_HEAD = """\
# JSON output of the commands

Every command that a program may read has `--json`. Its output is the same object every time:
the keys do not depend on arguments, every key is there, and what does not apply is null or
empty. Each object is one line in ASCII; a command prints one, or one per event where its section
says so. Numbers have their unit in the name of the key. Keys may be added in later versions; a
key that is there keeps its meaning.

Measurements (`bench`, `accuracy`, `demo`) begin with `version` and `host`; a benchmark adds its
name (`benchmark`) and its `parameters`. Their times are medians over the rounds where nothing
else is said, and a ratio `a_of_b` is a divided by b, which took turns in one run.

In the tables, `a.b` is key `b` of the object `a`, `a[].b` is key `b` of each object in the
array `a`, and `a.*` stands for keys that are names, such as those of parameters. A `pair` is an
array of two integers, a `scalar` a number or a string.

`tools/outputs/` has the structures, and this page is made from them
(`python -m kvmhost.tools.outputs.page`). Tests run the commands and compare
what they print with the tables, key by key. The control sockets' own messages are in
[control.md](control.md) and [reclaimd.md](reclaimd.md).
"""

_ERRORS = """\
## Errors

A command that fails prints its message on standard error, with `--json` too, and returns one of
the exit codes of `kvmhost --help`. With `--json` it also prints this object instead of its
own. It has the keys of the errors of the [control API](control.md), with the exit code in
place of the HTTP status.
"""

_TABLE = ("| key | type | unit | meaning |", "|---|---|---|---|")


def page() -> str:
    """Return the text of docs/json.md."""
    return "\n".join([_HEAD, _ERRORS, *_table(ErrorOutput), "", *_commands(), *_without()])


def _commands() -> Iterator[str]:
    for command, shape in sorted(OUTPUTS.items()):
        yield f"## kvmhost {command}"
        yield ""
        yield f"JSON lines, one per {shape.per}." if shape.per else "One object."
        yield ""
        yield from _table(shape.of)
        yield ""


def _table(structure: type[msgspec.Struct]) -> Iterator[str]:
    yield from _TABLE
    for row in rows_of(structure):
        cells = (f"`{row.path}`", row.kind, row.unit, row.meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _without() -> Iterator[str]:
    yield from ("## Commands without --json", "", "| command | why |", "|---|---|")
    for command, text in sorted(WITHOUT_JSON.items()):
        yield f"| `kvmhost {command}` | {text} |"
    yield ""


def parse(text: str) -> dict[str, list[Row]]:
    """Return the rows of each section of a page, by its heading."""
    found: dict[str, list[Row]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.replace("\\|", "\0").split("|")]
        if len(cells) == 6 and cells[1].startswith("`"):
            path, kind, unit, meaning = (cell.replace("\0", "|") for cell in cells[1:5])
            found.setdefault(heading, []).append(Row(path.strip("`"), kind, unit, meaning))
    return found


if __name__ == "__main__":
    sys.stdout.write(page())
