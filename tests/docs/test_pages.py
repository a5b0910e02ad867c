"""README.md and docs/*.md agree with the code: links, commands, endpoints, metrics, bounds."""

from __future__ import annotations

import argparse
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import (
    PAGES,
    ROOT,
    code_spans,
    kvmhost_commands,
    links,
    name_of,
    prose,
    tables,
)

from kvmhost.tools import bench, ending, young
from kvmhost.tools.bench.bounds import BOUNDS
from kvmhost.tools.commands import COMMANDS
from kvmhost.tools.tree import commands

#: Commands with names below them.
NESTED = {"young": young.SUBCOMMANDS, "bench": bench.SUBCOMMANDS}
#: Options of other programs that the pages name.
FOREIGN_OPTIONS = {
    "--unix-socket": "curl",
    "--input": "damo",
    "--timeout": "pytest",
    "--help": "every command",
    "--version": "kvmhost",
    "--results": "tests/mutation/run.py",
    "--seconds": "tests/mutation/run.py",
    "--shard": "tests/mutation/run.py",
    "--table": "tests/mutation/run.py",
}


@functools.cache
def options_of(module_name: str) -> frozenset[str]:
    """Return the option strings of a command's parser."""
    return frozenset(_option_strings(importlib.import_module(module_name).parser()))


def _option_strings(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _option_strings(inner)


#: Every command, with the name below it if it has one, and its module.
MODULES = {" ".join(command.words): command.module for command in commands()}


def command_of(words: list[str]) -> tuple[str, list[str]]:
    """Split a command line into the command that it names and the rest."""
    two = " ".join(words[1:3])
    return (two, words[3:]) if two in MODULES else (" ".join(words[1:2]), words[2:])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in kvmhost_commands(page):
        if len(words) < 2 or words[1].startswith("-") or not words[1].islower():
            assert set(words[1:]) <= {"--version", "--help", "COMMAND", *words[2:]}, words
            continue
        command, rest = command_of(words)
        if command in NESTED and (not rest or not rest[0].islower()):
            continue  # the family: `kvmhost young NAME`
        assert command in MODULES, f"no command: {' '.join(words)}"
        known = options_of(MODULES[command])
        for word in rest:
            if re.match(r"--?[a-z]", word):
                option = re.match(r"--?[\w-]+", word)
                assert option is not None
                assert option[0] in known, f"no option {word}: {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_named_alone_exist(page: Path) -> None:
    everything = frozenset().union(*(options_of(module) for module in MODULES.values()))
    for text in code_spans(page):
        if text.startswith("--"):
            option = re.match(r"--[\w-]+", text)
            assert option is not None, text
            assert option[0] in everything | FOREIGN_OPTIONS.keys(), f"no command has {option[0]}"


def test_every_command_is_in_the_readme() -> None:
    said = {" ".join(words[1:2]) for words in kvmhost_commands(ROOT / "README.md")}
    assert said >= set(COMMANDS)
    rows = [row for table in tables(ROOT / "README.md") for row in table]
    for family, names in NESTED.items():
        (row,) = (row for row in rows if row.get("command") == f"`kvmhost {family} NAME`")
        listed = set(re.findall(r"[a-z]+", row["what it does"].rpartition(":")[2]))
        assert listed == set(names), family


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_exist(page: Path) -> None:
    root = r"(?:kvmhost|reclaim|guests|tools|tests|docs|examples)/[\w./*-]+"
    for text in code_spans(page):
        match = re.match(rf"(?:(?:.* )?(?:python|pytest) (?:[^`]*? )?)?({root})", text)
        if match and "…" not in text:
            path = match[1].rstrip(".,")
            found = any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()
            assert found or any(ROOT.glob(f"{path}.*")), f"{path} does not exist"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_modules_named_can_be_imported(page: Path) -> None:
    text = page.read_text()
    for path in sorted(set(re.findall(r"\bkvmhost(?:\.[a-z_]\w*)+(?:\.[A-Z]\w*)?", text))):
        if path in ("kvmhost.policies", "kvmhost.params") or path.endswith((".sock", ".png")):
            continue
        assert _exists(path), f"{path} does not exist"
    for module, names in re.findall(r"^from (kvmhost[\w.]*) import (.+)$", text, re.M):
        for name in names.split(","):
            assert _exists(f"{module}.{name.strip()}"), f"{module} has no {name.strip()}"


def _exists(path: str) -> bool:
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_endpoints_of_a_vm_are_those_documented() -> None:
    from kvmhost.control.routes import Routes

    table = Routes.__init__.__code__  # the paths are constants of the constructor
    paths = {text for text in _constants(table) if text.startswith("/v1/")}
    source = Path(importlib.import_module("kvmhost.control.routes").__file__ or "").read_text()
    named = {("GET", "/v1/pages/GFN"), ("DELETE", "/v1/views/NAME")}
    served = set(_routes(source)) | named
    assert {path for _, path in served - named} == paths
    assert served == documented(ROOT / "docs" / "control.md")


def test_endpoints_of_the_daemon_are_those_documented() -> None:
    source = Path(importlib.import_module("kvmhost.reclaim.control.server").__file__ or "")
    assert set(_routes(source.read_text())) == documented(ROOT / "docs" / "reclaimd.md")


def _constants(code: object) -> Iterator[str]:
    for constant in getattr(code, "co_consts", ()):
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (text for text in constant if isinstance(text, str))


def _routes(source: str) -> Iterator[tuple[str, str]]:
    """Yield method and path of every entry of a table of routes."""
    for path, methods in re.findall(r'"(/(?:v1/)?[\w/]+)": \{([^}]*)\}', source):
        for method in re.findall(r'"([A-Z]+)":', methods):
            yield method, path


def documented(page: Path) -> set[tuple[str, str]]:
    found = set()
    for table in tables(page):
        for row in table:
            match = re.match(r"`([A-Z]+) (/[^`]+)`", row.get("request", ""))
            if match:
                found.add((match[1], match[2]))
    return found


def test_metrics_are_those_documented() -> None:
    from kvmhost.reclaim.control import metrics

    families = {family.name: family for family in (*metrics.PER_VM, *metrics.PER_HOST)}
    extra = {metrics._LATENCY: "histogram", metrics._DECISIONS: "counter"}
    rows = {
        row["metric"].strip("`"): row
        for table in tables(ROOT / "docs" / "reclaimd.md")
        for row in table
        if "metric" in row
    }
    del rows["reclaimd_process_…"], rows["reclaimd_vm_policy_…"]
    assert set(rows) == set(families) | set(extra)
    for name, family in families.items():
        labels = (["vm"] if family in metrics.PER_VM else []) + [family.label] * bool(family.label)
        assert rows[name]["kind"] == family.kind, name
        assert rows[name]["labels"] == ", ".join(labels), name
        assert rows[name]["what"] == family.about, name


def test_options_of_the_daemon_are_those_documented() -> None:
    from kvmhost.reclaim.settings.config import options

    rows = {
        row["key"].strip("`"): row
        for table in tables(ROOT / "docs" / "reclaimd.md")
        for row in table
        if "key" in row and "default" in row
    }
    assert set(rows) == {option.key for option in options()}
    for option in options():
        assert rows[option.key]["what"] == option.about, option.key


#: As the table in the module that maps errors to them has it.
EXIT_CODES = {int(code) for code in re.findall(r"^(\d+)  ", ending.__doc__ or "", re.M)}


def test_exit_codes_are_those_of_the_code() -> None:
    assert {getattr(ending, name) for name in dir(ending) if name.startswith("EXIT_")} - {
        ending.EXIT_SIGNAL  # a base: 128 and the number of the signal
    } <= EXIT_CODES
    text = re.sub(r"\s+", " ", prose(ROOT / "README.md"))
    said = text[text.index("Exit codes:") :]
    said = said[: said.index("`run` passes")]
    assert {int(code) for code in re.findall(r"(?<![\w.])\d+(?![\w.])", said)} == EXIT_CODES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_exit_codes_named_are_documented(page: Path) -> None:
    for code in re.findall(r"[Ee]xit (?:code|status) (\d+)", re.sub(r"\s+", " ", prose(page))):
        assert int(code) in EXIT_CODES, f"exit code {code} is not documented"


def test_bounds_are_those_of_the_benchmarks() -> None:
    bounds = {bound.what: str(bound) for bound in BOUNDS.values()}
    said = set()
    for page in PAGES:
        for row in (row for table in tables(page) for row in table if row.get("bound")):
            what = row["what"]
            assert what in bounds, f"{name_of(page)}: no bound for {what!r}"
            assert row["bound"] == bounds[what], f"{name_of(page)}: {what}"
            said.add(what)
    assert said == set(bounds), "bounds that no page quotes"


def test_benchmarks_of_the_bounds_exist() -> None:
    assert {key.partition(".")[0] for key in BOUNDS} <= set(bench.SUBCOMMANDS)
