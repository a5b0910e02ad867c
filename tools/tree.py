"""All commands with their parsers, for the generators of help, completion and man pages.

A command's module is imported when its parser is requested, so that startup stays fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from kvmhost import __version__
from kvmhost.errors import LayoutError
from kvmhost.suggest import unknown_name
from kvmhost.tools.commands import COMMANDS
from kvmhost.tools.dispatch import module_of
from kvmhost.tools.parser import CommandParser

__all__ = ["Command", "commands", "find", "full_parser", "root_parser"]


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: its words after ``kvmhost``, its one-line description, and its module."""

    words: tuple[str, ...]
    about: str
    module: str

    @property
    def children(self) -> Mapping[str, str]:
        """Return the one-line descriptions of the subcommands, by name."""
        module = importlib.import_module(self.module)
        return cast("Mapping[str, str]", getattr(module, "SUBCOMMANDS", {}))

    def parser(self) -> CommandParser:
        """Return the parser of the command's arguments."""
        return cast(CommandParser, importlib.import_module(self.module).parser())


def commands() -> Iterator[Command]:
    """Iterate over all commands, each before its subcommands."""
    for name, (module, about) in COMMANDS.items():
        command = Command((name,), about, f"kvmhost.tools.{module}")
        yield command
        for child, line in command.children.items():
            yield Command((name, child), line, module_of(command.module, child))


def find(words: Sequence[str]) -> Command:
    """Return the command named by the words.

    :raises LayoutError: if there is none
    """
    known = {command.words: command for command in commands()}
    if tuple(words) not in known:
        last = len(words) - 1
        names = [w[last] for w in known if len(w) == len(words) and w[:last] == tuple(words[:last])]
        raise LayoutError(unknown_name("command", words[-1], names))
    return known[tuple(words)]


def root_parser() -> CommandParser:
    """Return the parser of ``kvmhost`` itself: its options, and the commands by name."""
    root, subparsers = _root()
    for name, (_, about) in COMMANDS.items():
        subparsers.add_parser(name, help=about.replace("%", "%%"), add_help=False)
    return root


def full_parser() -> CommandParser:
    """Return one parser with all commands and all of their arguments."""
    root, subparsers = _root()
    for name, (module, about) in COMMANDS.items():
        command = Command((name,), about, f"kvmhost.tools.{module}")
        parser = _add(subparsers, command)
        if command.children and not parser._subparsers:
            below = parser.add_subparsers(dest="name", metavar="NAME")
            for child, line in command.children.items():
                _add(below, Command((name, child), line, module_of(command.module, child)))
    return root


_Subparsers = argparse._SubParsersAction  # There is no public name.


def _root() -> tuple[CommandParser, _Subparsers[CommandParser]]:
    root = CommandParser(prog="kvmhost", description="A userspace KVM host, and page reclaim.")
    root.add_argument("-V", "--version", action="version", version=f"kvmhost {__version__}")
    return root, root.add_subparsers(title="commands", dest="command", metavar="COMMAND")


def _add(subparsers: _Subparsers[CommandParser], command: Command) -> CommandParser:
    """Add a command's parser with the command's arguments."""
    own = command.parser()
    return subparsers.add_parser(
        command.words[-1],
        help=command.about.replace("%", "%%"),
        description=own.description,
        parents=[own],
        add_help=False,
    )
