"""``kvmhost man``: manual pages, generated from the commands' parsers.

Without COMMAND, it shows kvmhost(1), which lists the commands. On a terminal the page is
shown by man(1) if it is installed; otherwise it is printed as troff. With --out, all
pages are written into a directory such as /usr/local/share/man/man1.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kvmhost import __version__
from kvmhost.errors import LayoutError
from kvmhost.files import write_file
from kvmhost.tools import ending
from kvmhost.tools.args import about
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.tree import commands, find, root_parser
from kvmhost.tools.vocabulary import add_option

__all__ = ["main", "pages", "parser"]


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost man",
        description=about(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command", nargs="*", metavar="COMMAND", help="such as run, or young heatmap"
    )
    add_option(parser, "--out", metavar="DIR", help="write all pages into this directory")
    return parser


def main(argv: Sequence[str]) -> int:
    """Show a page, or write all pages."""
    args = parser().parse_args(argv)
    if args.out is not None:
        if args.command:
            raise LayoutError("--out writes all pages: give no COMMAND with it")
        _write(args.out)
    elif args.command:
        command = find(args.command)
        _show(_page("-".join(("kvmhost", *command.words)), command.parser(), command.about))
    else:
        _show(_root_page())
    return 0


def pages() -> dict[str, str]:
    """Return all pages as troff, by name, such as ``kvmhost-run``."""
    made = {"kvmhost": _root_page()}
    for command in commands():
        name = "-".join(("kvmhost", *command.words))
        made[name] = _page(name, command.parser(), command.about)
    made["reclaimd"] = ".so man1/kvmhost-reclaimd.1\n"
    return made


def _root_page() -> str:
    page = _page("kvmhost", root_parser(), "a userspace KVM host, and page reclaim")
    # The sections of the commands would be empty: each command has a separate page.
    head, _, _ = page.partition(".SH COMMAND \\fI")
    return f"{head}.SH EXIT STATUS\n{_exit_status()}{_SEE}{page.rpartition(_SEE)[2]}"


_SEE = ".SH SEE ALSO\n"


def _exit_status() -> str:
    """Return the table in the docstring of :mod:`kvmhost.tools.ending` as tagged paragraphs."""
    table = (ending.__doc__ or "").split("\n====")[2]
    rows = [line.split(maxsplit=1) for line in table.splitlines()[1:] if line]
    return "".join(f".TP\n.B {code}\n{meaning}\n" for code, meaning in rows).replace("``", "")


def _escaped(line: str) -> str:
    """Escape a line that begins with a period or an apostrophe, which troff reads as a request."""
    return rf"\&{line}" if re.match(r"'|\.(?!nf$|fi$)[^A-Z]", line) else line


def _page(name: str, parser: CommandParser, line: str) -> str:
    from argparse_manpage.manpage import Manpage

    page = Manpage(parser)
    page.prog, page.description = name, line
    page.source, page.manual = f"kvmhost {__version__}", "kvmhost commands"
    text = "".join(_escaped(line) for line in str(page).splitlines(keepends=True))
    others = ["kvmhost(1)"] if name != "kvmhost" else [f"kvmhost-{n}(1)" for n in _names()]
    see = ", ".join(others).replace("-", r"\-")
    return f"{text}{_SEE}{see}\n"


def _names() -> list[str]:
    return [command.words[0] for command in commands() if len(command.words) == 1]


def _write(folder: Path) -> None:
    """Write every page.

    :raises LayoutError: if a page cannot be written
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in pages().items():
            write_file(folder / f"{name}.1", text.encode(), sync=False, mode=0o666)
    except OSError as error:
        raise LayoutError(f"{error.filename or folder}: {error.strerror}") from error
    print(f"{folder}: {len(pages())} pages")


def _show(text: str) -> None:
    """Show a page with man(1) on a terminal, else print it."""
    if sys.stdout.isatty() and shutil.which("man"):
        subprocess.run(["man", "-l", "-"], input=text, text=True, check=False)
    else:
        print(text, end="")
