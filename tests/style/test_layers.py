"""The order of layers inside kvmhost and reclaim: a module imports from lower layers only.

Imports under ``TYPE_CHECKING`` and inside functions count. Modules of one layer do not
import each other, so the order also excludes cycles.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest
from source_tree import PACKAGES, folder_of, modules_of, room_of

#: Package: its modules and subpackages, from the lowest layer to the highest.
LAYERS = {
    "kvmhost": (
        {
            "_core",
            "closing",
            "decoding",
            "errors",
            "exits",
            "installing",
            "printable",
            "signals",
            "suggest",
            "units",
        },
        {"_ffi", "bitmap", "ownership", "temporary", "timescale"},
        {"files", "vm"},
        {"kvm", "memory"},
        {"boot", "devices", "mmu", "pager"},
        {"engine"},
        {"trackers"},
        {"machine"},
        {"control"},
        {"lab", "process"},
        {"doctor"},
        {"__main__"},
    ),
    "kvmhost/_core": ({"build"},),
    "kvmhost/boot": (
        {"acpi", "elf", "longmode", "pcboot"},
        {"firmware", "image", "multiboot", "pvh"},
        {"params", "plain"},
        {"loaders", "tiny"},
    ),
    "kvmhost/control": (
        {"inflight", "paths", "peers", "ratelog", "schema"},
        {"handler", "residency", "transport"},
        {"caller", "lease", "pauses", "readers", "serving"},
        {"client", "routes"},
        {"listing", "server"},
    ),
    "kvmhost/devices": (
        {"board", "clock", "freelist", "fwcfg", "serial"},
        {"bus", "console"},
    ),
    "kvmhost/engine": (
        {
            "base",
            "cpumodel",
            "kickmodel",
            "memoryfault",
            "outside",
            "portinsn",
            "turns",
            "unicorncpu",
        },
        {"emulated", "kvm"},
        {"kvmpc"},
    ),
    "kvmhost/kvm": (
        {"caps", "exits", "filters", "ring", "structs"},
        {"descriptor"},
        {"device", "guestmemfd", "stats", "vcpu_state", "vm_events", "vm_irq", "xen"},
        {"vcpu", "vm_memory"},
        {"vm"},
        {"coalesced", "system"},
        {"msrs"},
    ),
    "kvmhost/lab": (
        {
            "cpio",
            "devicetree",
            "epochs",
            "kernel",
            "messages",
            "monitor",
            "pins",
            "probes",
            "ram",
            "scratch",
        },
        {"agent", "hosts"},
        {"apt", "cache", "initrd", "qemu"},
        {"fetching", "project"},
        {"roots"},
        {"inside"},
        {"running"},
        {"tables"},
    ),
    "kvmhost/machine": (
        {"chunks", "disasm", "paging", "parts", "runner", "vcpustate"},
        {"failures", "memslots", "snapfile"},
        {"running"},
        {"snapshot"},
        {"base"},
        {"pc", "tiny"},
        {"aliased", "factory", "restore"},
    ),
    "kvmhost/memory": ({"layout"}, {"guest", "pclayout"}, {"pagelist", "dma"}),
    "kvmhost/mmu": (
        {"explorer", "formats", "memslots", "tablemem", "tlb"},
        {"epochs", "flush", "harvest", "races", "rmap"},
        {"table"},
        {"kvmtable", "radix", "soft", "stage2", "support", "tdp", "vcpu"},
        {"notifier"},
        {"feed"},
    ),
    "kvmhost/pager": (
        {"hostswap", "hugepages", "options", "results", "storefile", "userfault"},
        {"codec"},
        {"pager"},
    ),
    "kvmhost/process": ({"procmaps"}, {"foreign"}, {"attach", "methods"}),
    "kvmhost/trackers": (
        {"base", "pagescan", "probeguest", "sampling"},
        {"calibration"},
        {"dirty", "guestpt", "idle", "pagemap", "uffd"},
        {"registry", "views"},
        {"forced", "rearmcost", "sharing"},
        {"harvesting"},
    ),
    "kvmhost/vm": ({"answers", "checks", "names"}, {"harvest"}, {"protocol"}),
    "reclaim": (
        {"errors", "loss", "policy", "sdnotify", "young"},
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
        {"parts"},
        {"heatmap"},
        {"heatmapdata"},
        {"registry", "render"},
        {"heatmaptiles", "live"},
        {"heatmaplayers"},
        {"heatmaphtml"},
    ),
    "reclaim/exchange": ({"common"}, {"copy", "damon", "dirty", "registry", "text"}),
    "reclaim/loss": ({"clearing"}, {"bound"}),
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
        {"chunks", "meta", "packedbits"},
        {"journal", "residency", "summary"},
        {"files"},
        {"reader"},
        {"clock", "writer"},
        {"frames", "recorder"},
    ),
    "reclaim/settings": ({"options", "lines"}, {"config"}),
    "reclaim/vm": (
        {"losscontrol", "pages", "target", "totals"},
        {"policydriver"},
        {"evictor"},
        {"session"},
        {"worker"},
    ),
    "reclaim/watch": ({"data", "map", "pace"}, {"app"}),
    "reclaim/young": ({"bits"},),
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


def edges_of(package: str) -> dict[str, set[str]]:
    """Return which children of a package import which of its other children."""
    parts = package.split("/")
    prefix = ".".join(parts if parts[0] == "kvmhost" else ("kvmhost", *parts)) + "."
    edges: dict[str, set[str]] = defaultdict(set)
    for path in modules_of(package):
        child = path.relative_to(folder_of(package)).parts[0].removesuffix(".py")
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
        # The linked packages are the concern of test_modules.
        if imported in level and level[imported] >= level[importer]
    ]


@pytest.mark.parametrize("package", LAYERS)
def test_modules_import_from_lower_layers_only(package: str) -> None:
    edges = edges_of(package)
    listed = sorted(child for layer in LAYERS[package] for child in layer)
    assert listed == sorted(edges), "every module is in one layer"
    assert violations(edges, LAYERS[package]) == []


def test_every_package_has_its_layers() -> None:
    found = {path.parent for path in modules_of("kvmhost", "reclaim")}
    assert {room_of(path) for path in found} == set(LAYERS)


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


def module_graph() -> dict[str, set[str]]:
    """Return every module of the tree with the modules that it imports."""
    paths = {}
    for path in modules_of(*PACKAGES):
        parts = Path(room_of(path)).with_suffix("").parts
        parts = parts if parts[0] == "kvmhost" else ("kvmhost", *parts)
        paths[".".join(parts).removesuffix(".__init__")] = path
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        # An imported name is a module, or something that a module defines.
        found = {n if n in paths else n.rpartition(".")[0] for n in imports_of(path)}
        graph[module] = found & set(paths) - {module}
    return graph


def cycles_of(graph: dict[str, set[str]]) -> list[str]:
    """Return what is left when modules without imports or importers are removed, repeatedly."""
    left = {module: set(targets) for module, targets in graph.items()}
    while True:
        imported = {target for targets in left.values() for target in targets}
        ends = {module for module, targets in left.items() if not targets or module not in imported}
        if not ends:
            return sorted(left)
        left = {module: targets - ends for module, targets in left.items() if module not in ends}


def test_no_cycles_of_imports() -> None:
    assert cycles_of(module_graph()) == []


def test_a_cycle_of_imports_is_found() -> None:
    ring = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "top": {"a"}}
    assert cycles_of(ring) == ["a", "b", "c"]
    assert cycles_of(ring | {"c": {"d"}}) == []


def test_public_classes_have_names_of_their_own() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in modules_of(*PACKAGES):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(room_of(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
