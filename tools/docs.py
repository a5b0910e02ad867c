"""``kvmhost docs``: show the documentation that is installed with kvmhost.

Without PAGE, it lists the pages with their titles, and the examples. With PAGE, it shows
that page: formatted and in a pager on a terminal, otherwise unformatted on standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import kvmhost
from kvmhost.errors import LayoutError
from kvmhost.suggest import unknown_name
from kvmhost.tools.args import about
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.terminal import unfiltered

__all__ = ["main", "pages", "parser"]

FOLDER = Path(kvmhost.__file__).parent / "docs"


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost docs",
        description=about(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("page", metavar="PAGE", nargs="?", help="name of a page or an example")
    parser.add_argument(
        "--path", action="store_true", help="print where the page is, or the folder of all of them"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """List the pages, or show one page."""
    args = parser().parse_args(argv)
    if args.page is None:
        print(FOLDER if args.path else _list())
        return 0
    known = pages()
    name = args.page.removesuffix(".md")
    if name not in known:
        raise LayoutError(unknown_name("page", args.page, known))
    if args.path:
        print(known[name])
    elif sys.stdout.isatty():
        _show(known[name])
    else:
        sys.stdout.write(known[name].read_text())
    return 0


def pages() -> dict[str, Path]:
    """Return the files of the pages by name; examples are named ``examples/NAME``."""
    found = {path.stem: path for path in sorted(FOLDER.glob("*.md"))}
    examples = sorted(path for path in FOLDER.glob("examples/**/*") if _is_page(path))
    return found | {str(path.relative_to(FOLDER)).removesuffix(".md"): path for path in examples}


def _is_page(path: Path) -> bool:
    return path.is_file() and path.suffix in (".c", ".md", ".py", ".toml")


def _list() -> str:
    known = {name: _title(path) for name, path in pages().items()}
    width = max((len(name) for name in known), default=0)
    lines = [f"  {name:<{width}}  {title}" for name, title in known.items()]
    return "\n".join([*lines, "", "kvmhost docs PAGE shows one; --path says where they are"])


def _title(path: Path) -> str:
    """Return the title of a file: its first heading, or the first line of its docstring."""
    for line in path.read_text().splitlines():
        title = line.strip('#/*"% \t')
        if title and title != "[markdown]":
            return title
    return ""


def _show(path: Path) -> None:
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.syntax import Syntax

    # less shows colours only with an option.
    os.environ.setdefault("LESS", "-R")
    console = Console()
    markdown = path.suffix == ".md"
    # Without a pager the text is written to standard output with its colours.
    with contextlib.redirect_stdout(unfiltered(sys.stdout)), console.pager(styles=True):
        console.print(Markdown(path.read_text()) if markdown else Syntax.from_path(str(path)))
