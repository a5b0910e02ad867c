"""Reads README.md and docs/*.md: links, tables, console blocks, options, paths."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def links(page: Path) -> list[str]:
    return _LINK.findall(_CODE.sub("", prose(page)))


def code_spans(page: Path) -> list[str]:
    """Return what stands between backquotes, a line break in it as a blank."""
    return [text.replace(r"\|", "|") for text in _CODE.findall(_joined(prose(page)))]


def _joined(text: str) -> str:
    """Join the lines of a paragraph, so that a code span may be broken over two lines."""
    return re.sub(r"(?<=[^\n|])\n(?=[^\n|#\-*>])", " ", text)


def shell_commands(page: Path) -> list[str]:
    """Return the commands of console and shell blocks, and of code spans."""
    found = []
    for kind, block in _FENCE.findall(page.read_text()):
        block = block.replace("\\\n", " ")
        if kind == "console":
            found += [line[2:] for line in block.splitlines() if line.startswith("$ ")]
        elif kind == "sh":
            found += block.splitlines()
    return found + [text for text in code_spans(page) if re.match(r"(kvmhost|reclaimd) ", text)]


def kvmhost_commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every ``kvmhost`` command line, comments and redirections cut off."""
    for line in shell_commands(page):
        line = re.sub(r"\$\([^)]*\)", "VALUE", line)
        for part in re.split(r"&&|;|\|(?![A-Z])|(?<!\d)>|\s#|&\s*$", line):
            words = _words(part)
            while words and "=" in words[0]:
                words = words[1:]
            if words and words[0].rpartition("/")[2] in ("kvmhost", "reclaimd"):
                yield ["kvmhost", "reclaimd", *words[1:]] if words[0] == "reclaimd" else words


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def tables(page: Path) -> Iterator[list[dict[str, str]]]:
    """Yield every table: its rows, by the heads of their columns."""
    lines = [*prose(page).splitlines(), ""]
    rows: list[list[str]] = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]])
        elif rows:
            yield [dict(zip(rows[0], row, strict=False)) for row in rows[2:]]
            rows = []
