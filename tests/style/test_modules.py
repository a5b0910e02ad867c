"""How the code is cut: docstrings, ``__all__``, layers, and light imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import LINKED, PACKAGES, modules_of, room_of

MODULES = modules_of(*PACKAGES)
#: Package: what it must not import.
FORBIDDEN = {
    "kvmhost": {"guests", "reclaim", "tools"},
    "reclaim": {"tools"},
    "guests": {"reclaim", "tools"},
    "tools": set(),
}


def imported(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=room_of)
def test_module_has_a_docstring_and_its_layer(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no docstring"
    if room_of(path) == "kvmhost/__main__.py":
        return
    package = room_of(path).partition("/")[0]
    names = imported(tree)
    assert not {name.split(".")[0] for name in names} & set(LINKED), "import it as kvmhost.NAME"
    roots = {name.split(".")[1] for name in names if name.startswith("kvmhost.")}
    assert not roots & FORBIDDEN[package]


@pytest.mark.parametrize("path", MODULES, ids=room_of)
def test_all_names_what_is_defined(path: Path) -> None:
    tree = ast.parse(path.read_text())
    listed: list[str] | None = None
    bound: set[str] = set()
    body = list(tree.body)
    if any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in body):
        # Names that are imported when they are first used, shown to the type checker.
        body += [inner for node in body if isinstance(node, ast.If) for inner in node.body]
    for node in body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            bound |= {leaf.id for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
            if isinstance(target, ast.Name) and target.id == "__all__":
                assert node.value is not None
                listed = ast.literal_eval(node.value)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
    if listed is None:
        assert path.name == "__init__.py", "no __all__"
        assert not bound, "an __init__ that offers something lists it"
        return
    assert len(listed) == len(set(listed))
    assert set(listed) <= bound


@pytest.mark.parametrize(
    "module", ["kvmhost", "kvmhost.machine", "kvmhost.engine.kvm", "kvmhost.tools.run"]
)
def test_light_imports(module: str) -> None:
    heavy = {"numpy", "unicorn", "aiohttp", "httpx", "matplotlib", "rich", "lz4"}
    code = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


def test_only_one_module_imports_the_extension_and_one_unicorn() -> None:
    extension = {
        room_of(path)
        for path in MODULES
        if "kvmhost._core._native" in imported(ast.parse(path.read_text()))
    }
    assert extension == {"kvmhost/_ffi.py"}
    naming = [room_of(path) for path in MODULES if 'import_module("unicorn")' in path.read_text()]
    assert naming == ["kvmhost/engine/unicorncpu.py"]


def test_one_module_defines_the_page_size() -> None:
    names = {"PAGE_BYTES", "PAGE_SHIFT", "PAGE_SIZE"}
    defining = {
        room_of(path)
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.lstrip("_") in names
    }
    assert defining == {"kvmhost/units.py"}
