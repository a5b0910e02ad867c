"""Commands with subcommands; the module of a subcommand is imported when it is run."""

from __future__ import annotations

import importlib
import keyword
import sys
from collections.abc import Callable, Mapping, Sequence

from kvmhost.suggest import unknown_name

__all__ = ["dispatch", "module_of"]


def dispatch(
    prog: str, about: str, package: str, names: Mapping[str, str], argv: Sequence[str]
) -> int:
    """Run the subcommand named by the first word of ``argv``.

    The ``--help`` option of the subcommand describes its options.

    :param names: one-line description by subcommand, which is also a module of ``package``
    :return: the subcommand's exit code; 2 if no subcommand has that name
    """
    if not argv or argv[0] in ("-h", "--help"):
        width = max(len(name) for name in names)
        lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in names.items())
        usage = f"usage: {prog} NAME [options]\n\n{about}\n\nnames:\n{lines}"
        print(usage, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] not in names:
        print(f"{prog}: {unknown_name('name', argv[0], names)}", file=sys.stderr)
        return 2
    module = importlib.import_module(module_of(package, argv[0]))
    run: Callable[[Sequence[str]], int] = module.main
    return run(argv[1:])


def module_of(package: str, name: str) -> str:
    """Return the module of a subcommand.

    The module of a subcommand whose name is a Python keyword ends in an underscore.
    """
    return f"{package}.{name}{'_' * keyword.iskeyword(name)}"
