"""The order of layers inside reclaim: a module imports from lower layers only.

Imports under ``TYPE_CHECKING`` and inside functions count. Modules of one layer do not
import each other, so the order also excludes cycles.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Package: its modules and subpackages, from the lowest layer to the highest.
LAYERS = {
    "reclaim": (
        {"errors", "policy", "sdnotify", "young"},
        {"account", "record"},
        {"analyse", "draw", "exchange", "pressure"},
        {"settings"},
        {"host"},
        {"context"},
        {"vm"},
        {"daemon"},
        {"control"},
        {"watch"},
    ),
    "reclaim/account": ({"decisions", "events"}, {"history"}),
    "reclaim/analyse": ({"analysis", "compare", "pagehistory", "patterns", "whatif"},),
    "reclaim/control": (
        {"commands", "metrics", "paths", "schema"},
        {"client", "explain"},
        {"server"},
    ),
    "reclaim/draw": (
        {"heatmap"},
        {"heatmapdata", "render"},
        {"heatmaptiles"},
        {"heatmaphtml"},
    ),
    "reclaim/exchange": ({"common"}, {"damon", "dirty", "text"}),
    "reclaim/policy": (
        {"base", "lru_gen_filter", "lru_gen_tiers"},
        {"age", "classic", "lru_gen", "random", "registry", "replay"},
        {"belady", "lru_gen_text"},
    ),
    "reclaim/pressure": (
        {"backoff", "budget", "kernelfiles", "limits", "probe", "shares"},
        {"cgroup", "controllers", "psi"},
    ),
    "reclaim/record": (
        {"chunks", "meta"},
        {"journal", "summary"},
        {"files"},
        {"reader"},
        {"clock", "writer"},
        {"frames", "recorder"},
    ),
    "reclaim/settings": ({"options"}, {"config"}),
    "reclaim/vm": (
        {"pages", "target", "totals"},
        {"policydriver"},
        {"evictor"},
        {"session"},
        {"worker"},
    ),
    "reclaim/watch": ({"data", "map"}, {"app"}),
    "reclaim/young": ({"bits", "live"},),
}


def imports_of(path: Path) -> set[str]:
    """Return the dotted names that a module imports, with each name of a from-import."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def edges_of(package: Path) -> dict[str, set[str]]:
    """Return which children of a package import which of its other children."""
    prefix = "kvmhost." + ".".join(package.relative_to(ROOT).parts) + "."
    edges: dict[str, set[str]] = defaultdict(set)
    for path in package.rglob("*.py"):
        child = path.relative_to(package).parts[0].removesuffix(".py")
        if child == "__init__":
            continue
        edges[child] |= {
            name.removeprefix(prefix).split(".")[0]
            for name in imports_of(path)
            if name.startswith(prefix)
        } - {child}
    return edges


def violations(edges: dict[str, set[str]], layers: tuple[set[str], ...]) -> list[str]:
    """Return the imports that do not lead to a lower layer, as text."""
    level = {child: number for number, layer in enumerate(layers) for child in layer}
    return [
        f"{importer} imports {imported}"
        for importer, targets in sorted(edges.items())
        for imported in sorted(targets)
        if level[imported] >= level[importer]
    ]


@pytest.mark.parametrize("package", LAYERS)
def test_modules_import_from_lower_layers_only(package: str) -> None:
    edges = edges_of(ROOT / package)
    listed = sorted(child for layer in LAYERS[package] for child in layer)
    assert listed == sorted(edges), "every module is in one layer"
    assert violations(edges, LAYERS[package]) == []


def test_every_package_has_its_layers() -> None:
    found = {path.parent for path in (ROOT / "reclaim").rglob("*.py")}
    assert {str(path.relative_to(ROOT)) for path in found} == set(LAYERS)


def test_an_import_from_a_higher_layer_is_found(tmp_path: Path) -> None:
    layers = ({"low"}, {"high"})
    assert violations({"high": {"low"}, "low": set()}, layers) == []
    assert violations({"high": set(), "low": {"high"}}, layers) == ["low imports high"]
    source = tmp_path / "m.py"
    source.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a.b import c\n"
        "def f():\n    import d.e\n"
    )
    assert imports_of(source) >= {"a.b.c", "d.e"}


def test_public_classes_of_reclaim_and_tools_have_names_of_their_own() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for package in ("kvmhost", "reclaim", "tools", "guests"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(str(path.relative_to(ROOT)))
    doubled = {
        name: found
        for name, found in places.items()
        if len(found) > 1 and any(place.startswith(("reclaim", "tools")) for place in found)
    }
    assert doubled == {}
