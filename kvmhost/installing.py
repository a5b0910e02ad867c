"""Install commands for the dependencies of optional features."""

from __future__ import annotations

import re
import sys
from pathlib import Path

__all__ = ["install_hint"]

_ROOT = Path(__file__).resolve().parent.parent


def install_hint(extra: str) -> str:
    """Return a remedy that installs an extra into this interpreter's environment.

    From a checkout it installs the checkout with the extra; elsewhere it names what the
    extra requires, since the file that kvmhost was installed from may not exist.

    >>> install_hint("plot")  # doctest: +SKIP
    'run: /usr/bin/python3 -m pip install -e "/home/me/kvmhost[plot]"'

    :param extra: such as ``plot``
    """
    pip = f"run: {sys.executable} -m pip install"
    if (_ROOT / "pyproject.toml").is_file():
        return f'{pip} -e "{_ROOT}[{extra}]"'
    return " ".join([pip, *(f'"{need}"' for need in _requirements(extra))])


def _requirements(extra: str) -> list[str]:
    """Return what an extra requires, from the metadata of the installation."""
    from importlib import metadata

    found = []
    for line in metadata.requires("kvmhost") or []:
        requirement, _, marker = line.partition(";")
        if re.search(rf"""extra\s*==\s*["']{re.escape(extra)}["']""", marker):
            found.append(requirement.strip())
    return found
