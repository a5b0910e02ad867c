"""Python mutants without a new import: a server with the tests in memory patches its forks.

Most mutants change one function. Its code is replaced in a fork of a process in which the
package is imported and the tests are collected, so that a mutant costs little more than the
tests that it meets. What runs at import cannot be changed so: :func:`changed_functions`
returns None for it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from cover import Timeouts

__all__ = ["Server", "changed_functions", "end_children", "wait_for"]

#: Flags of a class body's or a module's code: neither optimized nor with new locals.
_CO_OPTIMIZED = 1


def changed_functions(before: str, after: str) -> list[tuple[CodeType, CodeType]] | None:
    """Return the functions of a module that differ, old and new; None if other code does."""
    pairs: list[tuple[CodeType, CodeType]] = []
    old, new = (compile(text, "file", "exec") for text in (before, after))
    return pairs if _compare(old, new, pairs) and pairs else None


def _compare(old: CodeType, new: CodeType, pairs: list[tuple[CodeType, CodeType]]) -> bool:
    """Collect the outermost functions that differ; return whether nothing else does."""
    if len(old.co_consts) != len(new.co_consts):
        return False
    for a, b in zip(old.co_consts, new.co_consts, strict=True):
        if not isinstance(a, CodeType) or not isinstance(b, CodeType):
            if a != b or type(a) is not type(b):
                return False
        elif a == b:
            continue
        elif a.co_flags & _CO_OPTIMIZED and b.co_flags & _CO_OPTIMIZED:
            pairs.append((a, b))
        elif not _compare(a, b, pairs):
            return False
    return (old.co_code, old.co_names) == (new.co_code, new.co_names)


def _patch(names: set[str], pairs: list[tuple[CodeType, CodeType]]) -> bool:
    """Give the functions of a file their new code; return whether each was found.

    :param names: of the file, as modules name it
    """
    functions = [
        found
        for found in gc.get_objects()
        if isinstance(found, FunctionType) and found.__code__.co_filename in names
    ]
    for old, new in pairs:
        places = [found for found in functions if found.__code__ == old]
        for place in places:
            place.__code__ = new.replace(co_filename=place.__code__.co_filename)
        if not places:
            return False
    return True


def wait_for(child: int, timeout_s: float) -> int | None:
    """Return the status of a child that leads a session; None if it was ended for its time."""
    fd = os.pidfd_open(child)
    ended = select.select([fd], [], [], timeout_s)[0]
    os.close(fd)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if ended else None


def end_children(spared: frozenset[int] = frozenset()) -> None:
    """End what has come to this process from a child that has ended."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while found := {int(word) for word in children.read_text().split()} - spared:
        for process in found:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


class Server:
    """A pytest plug-in that, in place of the tests, answers requests for runs of some of them.

    :param source: pipe of requests, one JSON object a line: ``root``, ``file``, ``before``,
        ``after``, ``tests``, ``limits``, ``timeout``
    :param target: pipe of answers: an exit status, None for a time-out, -1000 if the mutant
        cannot be patched in
    """

    #: The answer of a mutant that has to be imported.
    CANNOT = -1000

    def __init__(self, source: int, target: int, timeout_status: int) -> None:
        self._source, self._target, self._timeout_status = source, target, timeout_status

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Serve until the other end closes."""
        items = {item.nodeid: item for item in session.items}
        gc.collect()
        gc.freeze()
        with os.fdopen(self._source) as source, os.fdopen(self._target, "w") as target:
            for line in source:
                asked = json.loads(line)
                child = os.fork()
                if child == 0:
                    os._exit(self._run(asked, [items[name] for name in asked["tests"]]))
                status = wait_for(child, asked["timeout"])
                end_children()
                print(json.dumps(self.CANNOT if status == 72 else status), file=target, flush=True)
        return True

    def _run(self, asked: dict[str, Any], items: list[pytest.Item]) -> int:
        os.setsid()
        gc.unfreeze()
        pairs = changed_functions(asked["before"], asked["after"])
        names = {f"{asked['root']}/{asked['file']}", f"{asked['root']}/kvmhost/{asked['file']}"}
        if pairs is None or not _patch(names, pairs):
            return 72
        watched = Timeouts(asked["limits"], self._timeout_status)
        for item, after in zip(items, [*items[1:], None], strict=True):
            with watched.limit(item.nodeid):
                reports = runtestprotocol(item, log=False, nextitem=after)
            if any(report.failed for report in reports):
                return 1
        return 0
