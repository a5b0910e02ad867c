"""``kvmhost completion``: a shell completion script, generated from the commands' parsers.

The script looks up the names of VMs, guests, trackers, policies and pages of the
documentation when they are completed.

  bash  kvmhost completion bash > ~/.local/share/bash-completion/completions/kvmhost
  zsh   kvmhost completion zsh > DIR/_kvmhost, with DIR in $fpath
  fish  kvmhost completion fish > ~/.config/fish/completions/kvmhost.fish
  tcsh  kvmhost completion tcsh > ~/.kvmhost.csh, and source it in ~/.tcshrc
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvmhost.tools.args import about
from kvmhost.tools.parser import CommandParser

__all__ = ["main", "parser"]

SHELLS = ("bash", "zsh", "fish", "tcsh")


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost completion",
        description=about(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("shell", nargs="?", choices=SHELLS, help="print its completion script")
    what.add_argument(
        "--words", choices=tuple(_WORDS), help="print these names, as the scripts ask for them"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Print a completion script, or completion words."""
    args = parser().parse_args(argv)
    print(script(args.shell) if args.shell else "\n".join(_WORDS[args.words]()))
    return 0


def script(shell: str) -> str:
    """Return the completion script of a shell."""
    import shtab

    from kvmhost.tools.tree import full_parser

    whole = full_parser()
    for action in _actions(whole):
        words = _words_of(action)
        if words:
            # shtab reads this attribute; argparse ignores it.
            action.complete = shtab.cmd(f"kvmhost completion --words {words} 2>/dev/null")  # type: ignore[attr-defined]
        elif action.type is Path or "FILE" in str(action.metavar):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(whole, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Iterate over the arguments of a parser and of those below it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
        else:
            yield action


def _words_of(action: argparse.Action) -> str:
    """Return the kind of names that an argument takes, or "" if it takes no names."""
    if action.choices is not None:
        return ""
    if action.metavar == "VM" or action.dest == "vm":
        return "vms"
    if action.dest in ("image", "name") and not action.option_strings:
        return "guests"
    named = {"--tracker": "trackers", "--trackers": "trackers", "--policy": "policies"}
    found = [named[option] for option in action.option_strings if option in named]
    return found[0] if found else "pages" if action.dest == "page" else ""


def _vms() -> list[str]:
    from kvmhost.control.paths import running_names

    return running_names()


def _guests() -> list[str]:
    from kvmhost.guests import image_names

    return image_names()


def _trackers() -> list[str]:
    from kvmhost.trackers import NAMES

    return ["auto", *NAMES]


def _policies() -> list[str]:
    from kvmhost.reclaim.policy.registry import offers

    return [offer.name for offer in offers().values() if offer.works]


def _pages() -> list[str]:
    from kvmhost.tools.docs import pages

    return list(pages())


_WORDS: dict[str, Callable[[], list[str]]] = {
    "vms": _vms,
    "guests": _guests,
    "trackers": _trackers,
    "policies": _policies,
    "pages": _pages,
}
