"""Options that several commands share: one name, unit, form and default for one meaning.

========================= ============= ========== =======================================
option                    form          default    meaning
========================= ============= ========== =======================================
``--range``               A:B           all        gfns from A up to before B
``--windows``             A:B           all        windows A up to before B of a record
``--count``               N                        number of windows
``--rounds``              N                        repetitions of a benchmark
``--epochs``              N                        epochs of a guest
``--interval``            TIME          1s         time between two harvests
``--duration``            TIME          1s         length of a measured segment
``--timeout``             TIME                     give up after this time
``--mem``                 SIZE          64M        guest memory
``--resident-max``        SIZE                     limit of resident memory
``--hot``                 SIZE|SHARE    10%        hot part of guest memory
``--fraction``            SHARE         1/8        part of the pages that is re-armed
``--pages``               N             8192       pages that a benchmark handles
``--prefetch``            PAGES         0          pages that come back with one
``--vcpus``               N             1          vCPUs
``--engine``              NAME          auto       what runs the vCPUs
``--tracker``             NAME          auto       where young bits come from
``--view``                NAME                     the reader's own window
``--force``                                        change the tracker that others use
``--policy``              NAME          lru_gen    which pages are evicted
``--format``              NAME                     table format, or format of a file
``--workload``, ``--part`` NAME,...     all        which of several
``--daemon``              NAME                     which daemon to ask
``-o``, ``--out``         FILE or DIR              what is written
``--json``                                         print JSON
========================= ============= ========== =======================================

A list is one word with commas, and its option is in the singular: ``--tracker a,b``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kvmhost.suggest import unknown_name
from kvmhost.tools.args import (
    count,
    gfn_range,
    hot_part,
    limit_bytes,
    mem_bytes,
    pages,
    seconds,
    share,
    view_name,
    window_range,
)

__all__ = ["OPTIONS", "add_option", "add_vm", "listed", "listing", "one_of"]

T = TypeVar("T")

#: Which engines a command line can name.
ENGINES = ("auto", "kvm", "emulated")

#: What an option is in every command that has it; a command adds its own help.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "--range": {
        "type": gfn_range,
        "metavar": "A:B",
        "help": "gfns from A up to before B; 0x for hex (default: all)",
    },
    "--windows": {
        "type": window_range,
        "metavar": "A:B",
        "help": "from window A up to before B; --windows=-60: is the last 60 (default: all)",
    },
    "--count": {"type": count, "metavar": "N"},
    "--rounds": {"type": count, "metavar": "N"},
    "--epochs": {"type": count, "metavar": "N"},
    "--interval": {"type": seconds, "metavar": "TIME", "default": "1s"},
    "--duration": {
        "type": seconds,
        "metavar": "TIME",
        "default": "1s",
        "help": "length of each measured segment",
    },
    "--timeout": {"type": seconds, "metavar": "TIME"},
    "--mem": {"type": mem_bytes, "metavar": "SIZE", "default": "64M", "help": "guest memory"},
    "--resident-max": {"type": limit_bytes, "metavar": "SIZE"},
    "--hot": {
        "type": hot_part,
        "metavar": "SIZE|SHARE",
        "default": "10%",
        "help": "hot part of guest memory, as a size or a share of it",
    },
    "--fraction": {"type": share, "metavar": "SHARE", "default": "1/8"},
    "--pages": {"type": count, "metavar": "N", "default": 8192},
    "--prefetch": {"type": pages, "metavar": "PAGES", "default": 0},
    "--vcpus": {"type": count, "metavar": "N", "default": 1, "help": "number of vCPUs"},
    "--engine": {
        "choices": ENGINES,
        "metavar": None,
        "default": "auto",
        "help": "what runs the vCPUs; auto is kvm where /dev/kvm works, else emulated",
    },
    "--tracker": {"metavar": "NAME", "default": "auto"},
    "--view": {
        "type": view_name,
        "metavar": "NAME",
        "help": "name under which this reads the VM; a reader has a window of its own",
    },
    "--force": {
        "action": "store_true",
        "help": "change the tracker also while others read by another one; it is put back at the "
        "end",
    },
    "--policy": {"metavar": "NAME", "default": "lru_gen"},
    "--format": {"metavar": "NAME"},
    "--workload": {"metavar": "NAME"},
    "--part": {"metavar": "NAME"},
    "--daemon": {
        "metavar": "NAME",
        "help": "which daemon to ask (default: the one that manages the VM)",
    },
    "--out": {"type": Path},
    "--json": {"action": "store_true", "help": "print JSON (kvmhost docs json has the keys)"},
}


def add_option(
    parser: argparse._ActionsContainer, name: str, short: str = "", **given: Any
) -> argparse.Action:
    """Add an option of :data:`OPTIONS`; what is given goes on top.

    :param short: another name, of one letter, where a command follows another program

    A default is appended to the help. It is written as on a command line (``"1s"``), and
    argparse reads it.
    """
    kept = {**OPTIONS[name], **given}
    default = kept.get("default")
    if default is not None and "(default" not in kept.get("help", ""):
        kept["help"] = f"{kept['help']} (default: {str(default).replace('%', '%%')})"
    short = short or ("-o" if name == "--out" else "")
    return parser.add_argument(*([short] if short else []), name, **kept)


def listing(
    read: Callable[[str], T], form: str = "NAME", default: Sequence[T] | None = None
) -> dict[str, Any]:
    """Return the form of an option that takes a list: ``a,b``, also given in several words."""
    return {
        "type": listed(read),
        "metavar": f"{form},...",
        "action": _Extend,
        "default": default,
    }


class _Extend(argparse.Action):
    """Collects the lists of repeated options; the first one replaces the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add values that are not there yet."""
        before = getattr(namespace, self.dest)
        kept = [] if before is self.default else before
        setattr(namespace, self.dest, [*kept, *(v for v in values if v not in kept)])


def listed(read: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Return a parser of words separated by commas, each read by ``read``.

    :raises argparse.ArgumentTypeError: for an empty word, and from ``read``
    """

    def read_list(text: str) -> list[T]:
        words = text.split(",")
        if not all(word.strip() for word in words):
            raise argparse.ArgumentTypeError(f"{text!r}: need names separated by commas")
        found: list[T] = []
        for word in words:
            value = read(word.strip())
            if value not in found:
                found.append(value)
        return found

    return read_list


def one_of(what: str, known: Sequence[str]) -> Callable[[str], str]:
    """Return a parser of one of several names, whose error suggests the closest one."""

    def read_name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(unknown_name(what, text, known))
        return text

    return read_name


def add_vm(parser: argparse._ActionsContainer, **given: Any) -> argparse.Action:
    """Add the argument VM."""
    kept = {"metavar": "VM", "help": "name of a VM, or path of its control socket", **given}
    return parser.add_argument("vm", **kept)
