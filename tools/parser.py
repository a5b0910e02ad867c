"""The parser of every command: an error is one line and suggests the closest match."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from kvmhost.printable import printable
from kvmhost.suggest import did_you_mean

__all__ = ["CommandParser", "UsageExit"]


class UsageExit(SystemExit):
    """Wrong usage: the message is on standard error, and the exit status is 2."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


class CommandParser(argparse.ArgumentParser):
    """An ``argparse.ArgumentParser`` that prints errors as one line, without the usage.

    Options cannot be abbreviated: a script must not change its meaning with a new option.
    """

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **given})

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self._print_message(
            f"{self.prog}: {printable(message)} (see {self.prog} --help)\n", sys.stderr
        )
        raise UsageExit(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; the error about an unknown option names the closest option."""
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            name = next((word for word in rest if word.startswith("-")), rest[0]).partition("=")[0]
            known = [option for option in self._option_string_actions if option.startswith("--")]
            hint = did_you_mean(name, known) if name.startswith("--") else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return parsed

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        hint = did_you_mean(str(value), known)
        raise argparse.ArgumentError(
            action, f"invalid choice {str(value)!r}{hint or ';'} choose from {', '.join(known)}"
        )
