"""docs/json.md is made from the structures, and has every command with ``--json``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest
from json_page import PAGE, problems

from kvmhost.tools.outputs import page
from kvmhost.tools.outputs.describe import DIMENSIONLESS, Row, rows_of
from kvmhost.tools.outputs.registry import OUTPUTS, WITHOUT_JSON
from kvmhost.tools.tree import commands


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every command that can be run, with its parser."""
    for command in commands():
        if command.children and command.words[0] in ("young", "bench", "lab"):
            continue
        yield from _below(" ".join(command.words), command.parser())


def _below(
    name: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from _below(f"{name} {word}", inner)
            return
    yield name, parser


def test_the_page_is_made_from_the_structures() -> None:
    assert PAGE.read_text() == page.page(), "python -m kvmhost.tools.outputs.page >docs/json.md"


def test_every_command_prints_a_described_structure_or_says_why_it_has_no_json() -> None:
    with_json = {name for name, parser in parsers() if "--json" in parser._option_string_actions}
    without = {name for name, _ in parsers()} - with_json
    assert with_json == set(OUTPUTS)
    assert without == set(WITHOUT_JSON)


@pytest.mark.parametrize("command", OUTPUTS)
def test_every_number_has_a_unit(command: str) -> None:
    """In its name; or it is a number that has none, such as a slot."""
    for row in rows_of(OUTPUTS[command].of):
        if "integer" in row.kind or "number" in row.kind:
            assert row.unit or row.path.rpartition(".")[2] in DIMENSIONLESS, row.path


def test_the_check_refuses_what_the_page_does_not_say() -> None:
    rows = [
        Row("n", "integer", "", ""),
        Row("a", "array of object or null", "", ""),
        Row("a[].k", '"x" or "y"', "", ""),
        Row("m", "map of number", "", ""),
    ]
    good = {"n": 1, "a": [{"k": "x"}], "m": {"any": 0.5}}
    assert list(problems(good, rows)) == []
    assert list(problems(good | {"a": None}, rows)) == []
    wrong = [
        {"n": None},
        {"n": True},
        {"n": 1.5},
        {"a": [{}]},
        {"a": [{"k": "z"}]},
        {"m": {"q": "1"}},
    ]
    wrong += [{"other": 1}, {"a": [{"k": "x", "l": 0}]}, {"m": []}]
    for change in wrong:
        assert len(list(problems(good | change, rows))) == 1, change
    assert list(problems({"n": 1, "a": []}, rows)) == ["m: missing"]
