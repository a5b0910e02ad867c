"""A userspace KVM host: guests on /dev/kvm, their page tables, and reclaim.

Importing this package imports no extension module and no numpy.
:class:`Machine` is where to start.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from kvmhost.machine.tiny import Machine

__all__ = ["Machine", "__version__"]

__version__ = "0.1.0"

#: Names that are imported when they are first used, and their modules.
_LAZY = {"Machine": "kvmhost.machine.tiny"}


def __getattr__(name: str) -> typing.Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
