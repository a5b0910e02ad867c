"""Owners forget a descriptor or pointer before they close or free it: see kvmhost/closing.py."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import PACKAGES, modules_of, room_of


def closed_too_early(function: ast.FunctionDef) -> Iterator[str]:
    """Find attributes that are passed to a call that releases, and set only afterwards."""
    released: dict[str, int] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Attribute):
            name = ast.unparse(node.func)
            if name == "os.close" or (name.startswith("lib.kh_") and name.endswith("_free")):
                released[ast.unparse(node.args[0])] = node.lineno
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in map(ast.unparse, node.targets):
                if released.get(target, node.lineno) < node.lineno:
                    yield f"{function.name}: {target}"


@pytest.mark.parametrize("path", modules_of(*PACKAGES), ids=room_of)
def test_what_is_closed_was_forgotten_before(path: Path) -> None:
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    assert [found for one in functions for found in closed_too_early(one)] == []


def test_the_check_finds_it() -> None:
    source = "def close(self):\n    os.close(self.fd)\n    self.fd = -1\n"
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    assert list(closed_too_early(function)) == ["close: self.fd"]


@pytest.mark.parametrize("path", modules_of(*PACKAGES), ids=room_of)
def test_temporary_folders_have_one_home(path: Path) -> None:
    if room_of(path) not in ("kvmhost/temporary.py", "reclaim/record/writer.py"):
        assert "TemporaryDirectory" not in path.read_text(), "use kvmhost.temporary"
        assert "mkdtemp" not in path.read_text(), "use kvmhost.temporary"
