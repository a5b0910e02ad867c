"""Which tests execute which lines: found once, so that a mutant meets only tests that reach it.

Each test runs in a fork of a process in which the tests are collected, so that what a test
before it has set up or cached is not there. Lines of Python are traced; lines of C are counted
by gcov. A test that starts other processes is taken to execute every line.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

__all__ = ["Cover", "Measured", "Recorder", "Selector", "Timeouts"]

#: Audit events of a process that starts another one.
_STARTS = frozenset({"subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty", "os.exec"})


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one test did.

    :param lines: by file, relative to the tree
    :param everywhere: it starts processes, whose lines are not known
    """

    seconds: float
    passed: bool
    everywhere: bool
    lines: dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class Cover:
    """All tests of a target, in the order in which they were collected.

    :param executable: lines of C with code; a line that is not among them, like one of a
        table, may concern every test
    :param imported: lines of Python that ran when the tests were collected
    """

    tests: dict[str, Measured]
    executable: dict[str, list[int]]
    imported: dict[str, list[int]]

    def tests_of(self, file: str, span: tuple[int, int]) -> list[str]:
        """Return the tests that reach a statement, the fastest first."""
        wanted = set(range(span[0], span[1] + 1))
        code = self.executable.get(file)
        anywhere = code is not None and not wanted & set(code)
        anywhere = anywhere or bool(wanted & set(self.imported.get(file, ())))
        chosen = [
            name
            for name, test in self.tests.items()
            if anywhere or test.everywhere or wanted & set(test.lines.get(file, ()))
        ]
        return sorted(chosen, key=lambda name: self.tests[name].seconds)

    def failed(self) -> list[str]:
        """Tests that fail as the code is."""
        return [name for name, test in self.tests.items() if not test.passed]

    def to_json(self) -> str:
        """For :meth:`from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Cover:
        """Read what :meth:`to_json` wrote."""
        raw = json.loads(text)
        tests = {name: Measured(**row) for name, row in raw.pop("tests").items()}
        return cls(tests, **raw)


class _Traced:
    """Lines of Python."""

    def __init__(self, root: Path, files: tuple[str, ...]) -> None:
        # kvmhost/reclaim is a link to reclaim, through which it is imported.
        self._names = {str(root / file): file for file in files}
        self._names |= {str(root / "kvmhost" / file): file for file in files}
        self._lines: dict[str, set[int]] = {}

    def start(self) -> None:
        self._lines = {}
        threading.settrace(self._called)
        sys.settrace(self._called)

    def stop(self) -> dict[str, list[int]]:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        return {self._names[name]: sorted(lines) for name, lines in self._lines.items()}

    def _called(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in self._names:
            return None
        lines = self._lines.setdefault(name, set())

        def executed(frame: FrameType, event: str, arg: Any) -> Any:
            lines.add(frame.f_lineno)
            return executed

        lines.add(frame.f_lineno)
        return executed


class _Counted:
    """Lines of C, of a library that was built with ``--coverage``.

    :param objects: folder of the compiled files, where counts are written
    """

    def __init__(self, library: Path, objects: Path, files: tuple[str, ...]) -> None:
        self._library, self._objects, self._files = library, objects, files
        self.executable: dict[str, list[int]] = {file: [] for file in files}

    def start(self) -> None:
        for path in self._objects.glob("*.gcda"):
            path.unlink()
        ctypes.CDLL(str(self._library)).kh_cover_reset()

    def stop(self) -> dict[str, list[int]]:
        ctypes.CDLL(str(self._library)).kh_cover_dump()
        return {}

    def read(self) -> dict[str, list[int]]:
        """Read the counts of the test that has ended, and of processes that it started."""
        names = [f"{Path(file).stem}.gcda" for file in self._files]
        names = [name for name in names if (self._objects / name).exists()]
        if not names:
            return {}
        command = ["gcov", "--json-format", "--stdout", *names]
        done = subprocess.run(command, cwd=self._objects, capture_output=True, check=True)
        found: dict[str, list[int]] = {}
        for text in done.stdout.splitlines():
            for part in json.loads(text)["files"]:
                file = next((f for f in self._files if part["file"].endswith("/" + f)), None)
                if file is not None:
                    rows = part["lines"]
                    self.executable[file] = sorted({row["line_number"] for row in rows})
                    lines = {row["line_number"] for row in rows if row["count"]}
                    found[file] = sorted(lines)
        return found


class Recorder:
    """A pytest plug-in that writes a :class:`Cover`.

    :param library: the C core, if it counts lines of C
    """

    def __init__(
        self, root: Path, files: tuple[str, ...], out: Path, library: Path | None, objects: Path
    ) -> None:
        self._counted = _Counted(library, objects, files) if library else None
        self._lines: Any = self._counted or _Traced(root, files)
        self._out, self._tests = out, dict[str, Measured]()
        self._imported: dict[str, list[int]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests(self) -> None:
        """Trace what importing the tests and the package executes."""
        if not self._counted:
            self._lines.start()

    def pytest_collection_finish(self) -> None:
        """End that trace."""
        if not self._counted:
            self._imported = self._lines.stop()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: Any) -> bool:
        """Run the test in a fork, and read what it reports."""
        source, target = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(source)
            self._run(item, target)
        os.close(target)
        with os.fdopen(source) as reports:
            text = reports.read()
        os.waitpid(child, 0)
        seconds, passed, everywhere, lines = json.loads(text) if text else (0.0, False, True, {})
        lines = self._counted.read() if self._counted else lines
        self._tests[item.nodeid] = Measured(seconds, passed, everywhere, lines)
        return True

    def _run(self, item: pytest.Item, target: int) -> None:
        started: list[str] = []
        sys.addaudithook(lambda event, _: started.append(event) if event in _STARTS else None)
        self._lines.start()
        since = time.monotonic()
        reports = runtestprotocol(item, log=False, nextitem=None)
        seconds = time.monotonic() - since
        lines = self._lines.stop()
        passed = not any(report.failed for report in reports)
        with os.fdopen(target, "w") as out:
            json.dump((seconds, passed, bool(started), lines), out)
        os._exit(0)

    def pytest_sessionfinish(self) -> None:
        """Write all that was found."""
        code = self._counted.executable if self._counted else {}
        self._out.write_text(Cover(self._tests, code, self._imported).to_json())


class Selector:
    """A pytest plug-in that leaves the named tests, in this order."""

    def __init__(self, names: list[str]) -> None:
        self._place = {name: number for number, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Drop and sort."""
        items[:] = [item for item in items if item.nodeid in self._place]
        items.sort(key=lambda item: self._place[item.nodeid])


class Timeouts:
    """A pytest plug-in that ends the process with a status where a test takes too long."""

    def __init__(self, seconds: dict[str, float], status: int) -> None:
        self._seconds, self._status = seconds, status

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Watch one test, from a thread that runs while C holds the others."""
        with self.limit(item.nodeid):
            return (yield)

    @contextlib.contextmanager
    def limit(self, name: str) -> Iterator[None]:
        """Watch a test."""
        seconds = self._seconds.get(name, 0.0)
        timer = threading.Timer(seconds, os._exit, [self._status])
        timer.daemon = True
        if seconds:
            timer.start()
        yield
        timer.cancel()
        if seconds:
            timer.join()
