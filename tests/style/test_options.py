"""Options of all commands: one name, unit and default for one meaning; no old names.

:mod:`kvmhost.tools.vocabulary` has the shared options. The exceptions are listed here, each
with its reason.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmhost.reclaim.settings.config import Option, options, read_flag
from kvmhost.tools.tree import commands
from kvmhost.tools.vocabulary import OPTIONS
from kvmhost.units import Mark, Share


@dataclasses.dataclass(frozen=True)
class Use:
    """One option of one command."""

    command: str
    name: str
    action: argparse.Action

    @property
    def form(self) -> str:
        """What stands for the value in the help; of a list, that of one of its items."""
        if self.action.choices is not None:
            return "|".join(map(str, self.action.choices))
        return str(self.action.metavar or "").removesuffix(",...")

    @property
    def default(self) -> Any:
        """The default as its type reads it."""
        default = self.action.default
        if isinstance(default, str) and callable(self.action.type):
            return self.action.type(default)
        return default

    def __str__(self) -> str:
        return f"kvmhost {self.command} {self.name}"


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    def below(words: str, parser: argparse.ArgumentParser) -> Iterator[Any]:
        yield words, parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, child in action.choices.items():
                    yield from below(f"{words} {name}", child)

    for command in commands():
        yield from below(" ".join(command.words), command.parser())


def uses() -> Iterator[Use]:
    for words, parser in parsers():
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
                continue
            names = [name for name in action.option_strings if name.startswith("--")]
            yield Use(words, names[0] if names else action.dest, action)


ALL = list(uses())
OF_NAME = {
    name: [use for use in ALL if use.name == name] for name in sorted({use.name for use in ALL})
}
SHARED = [
    name
    for name, found in OF_NAME.items()
    if (len(found) > 1 and name.startswith("--")) or name in (*OPTIONS, "vm", "gfn")
]

#: Names that were used before the vocabulary, and what to write.
BANNED = {
    "--output": "--out",
    "--plot": "--out",
    "--trackers": "--tracker",
    "--formats": "--format",
    "--policies": "--policy",
    "--workloads": "--workload",
    "--codecs": "--part",
    "--faults": "--part",
    "--overhead": "--part",
    "--repeats": "--rounds",
    "--repeat": "--rounds",
    "--seconds": "--duration",
    "--rate": "--interval",
    "--window": "--interval",
    "--gib": "--mem",
    "--hour": "--count",
    "--sample": "--fraction",
    "--share": "--min-share",
    "--limit": "--resident-max",
    "--gfn-start": "--range",
    "--start-gfn": "--range",
    "--cpus": "--vcpus",
    "--memory": "--mem",
    "--table-format": "--format",
}

#: Options whose default is what their command measures or shows; the help has it.
OWN_DEFAULTS = {
    "--view": "each reader has a window of its own, which is named after it",
    "--count": "the number of windows is what a benchmark or recording is about",
    "--epochs": "the length of a run is what a command measures",
    "--rounds": "a benchmark has as many as its figure needs to be stable",
    "--mem": "a benchmark's figures are those of its own guest size",
    "--vcpus": "a stress test uses every processor",
    "--timeout": "a limit that is far above what the command needs",
    "--part": "a benchmark has parts of its own",
    "--workload": "accuracy and bench reclaim have workloads of their own",
}

#: (command, option): why its default differs.
DEFAULT_EXCEPTIONS = {
    ("run", "--append"): "the kernel command line, as in QEMU; that of a record is a flag",
    ("run", "--tracker"): "a VM starts no tracker unless it is told to",
    ("accuracy", "--tracker"): "compares all trackers that work",
    ("bench harvest", "--tracker"): "compares all trackers that work",
    ("bench sampling", "--tracker"): "the tracker whose cost is smallest",
    ("accuracy", "--interval"): "a list of three, each a row of the table",
    ("bench sampling", "--fraction"): "a list, each a row of the table",
    ("reclaimd", "--fraction"): "the daemon re-arms every page that it clears",
    ("bench reclaim", "--duration"): "segments of real guests have several passes",
    ("pause", "--duration"): "a VM stays paused unless it is told otherwise",
    ("demo", "--hot"): "a hot set that fits into half of the memory",
    ("demo", "--out"): "the picture is what the demo ends with",
    ("reclaimd", "--json"): "a key of the configuration: None is what the file says",
}

#: (command, option): why its values differ from those of the same name.
FORM_EXCEPTIONS = {
    ("run", "--append"): "the kernel command line, as in QEMU; that of a record is a flag",
    ("reclaimd", "--set"): "an option of some VMs; whatif's has several values of an option",
    ("run", "--cpu"): "a model of a processor, as in QEMU; the daemon's is a share of one",
}

#: What texts an option of a form reads, and which it refuses.
FORMS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "TIME": ({"500ms": 0.5, "2m": 120.0, "1": 1.0}, ("5M", "-1s", "x")),
    "SIZE": ({"64M": 64 << 20, "1.5GiB": 3 << 29, "16384pages": 64 << 20}, ("12Q", "x", "-1")),
    "SHARE": ({"12.5%": 0.125, "1/8": 0.125, "0.125": 0.125}, ("12.5", "x", "-1%")),
    "SIZE|SHARE": (
        {"64M": Mark.parse("64M"), "1/8": Mark(share=Share(0.125))},
        ("x", "150%", "12.5"),
    ),
    "N": ({"5": 5}, ("x", "1.5", "-2")),
    "PAGES": ({"3": 3, "0x10": 16}, ("x", "-1")),
    "GFN": ({"1025": 1025, "0x401": 1025}, ("x", "-1")),
    "A:B": ({}, ("x", "3")),
    "FILE": ({}, ()),
}


def ids(use: Use) -> str:
    return str(use)


@pytest.mark.parametrize("use", ALL, ids=ids)
def test_no_old_name(use: Use) -> None:
    assert use.name not in BANNED, f"{use}: write {BANNED[use.name]}"


@pytest.mark.parametrize("name", SHARED)
def test_one_name_has_one_form(name: str) -> None:
    forms = {
        use.form.split(".")[0] if name == "--out" else use.form: use
        for use in OF_NAME[name]
        if (use.command, name) not in FORM_EXCEPTIONS
    }
    if name == "--out":
        assert set(forms) <= {"FILE", "DIR", "OUT"}
        assert all(use.action.type is Path for use in OF_NAME[name])
        assert all("-o" in use.action.option_strings for use in OF_NAME[name])
    elif name == "--format":
        assert len([form for form in forms if form == "NAME" or "stage2" in form]) == len(forms)
    else:
        assert len(forms) <= 1, sorted(map(str, forms.values()))
        if name in OPTIONS:
            metavar = OPTIONS[name].get("metavar")
            choices = OPTIONS[name].get("choices")
            assert set(forms) <= {"|".join(choices) if choices else str(metavar or "")}


@pytest.mark.parametrize("name", SHARED)
def test_one_name_has_one_default(name: str) -> None:
    if name in OWN_DEFAULTS or not name.startswith("--"):
        return
    found: dict[str, list[str]] = {}
    for use in OF_NAME[name]:
        if (use.command, name) not in DEFAULT_EXCEPTIONS:
            value = None if use.command == "reclaimd" else use.default
            if value is not None:
                found.setdefault(repr(value), []).append(str(use))
    assert len(found) <= 1, found


@pytest.mark.parametrize("use", [use for use in ALL if use.form in FORMS], ids=ids)
def test_a_form_reads_the_same_everywhere(use: Use) -> None:
    good, bad = FORMS[use.form]
    read = use.action.type
    for text, value in good.items():
        found = read(text)  # type: ignore[operator]
        assert (found == [value]) if isinstance(found, list) else (found == value), text
    for text in bad:
        if use.form == "N" and text == "-2" and (use.command, use.name) in NEGATIVE:
            continue
        with pytest.raises((argparse.ArgumentTypeError, ValueError)) as caught:
            read(text)  # type: ignore[operator]
        # argparse shows the message of an ArgumentTypeError only.
        assert isinstance(caught.value, argparse.ArgumentTypeError), (str(use), text)
        assert text in str(caught.value), (str(use), str(caught.value))


#: Numbers that may be negative.
NEGATIVE = {("reclaimd", "--seed"): "-1 is no seed"}


@pytest.mark.parametrize("use", ALL, ids=ids)
def test_a_numeric_type_has_a_form(use: Use) -> None:
    assert use.action.type not in (int, float), f"{use}: use kvmhost.tools.args"
    if use.action.type not in (None, Path) and use.action.option_strings:
        assert use.action.metavar, f"{use}: no metavar"


@pytest.mark.parametrize("use", ALL, ids=ids)
def test_every_option_has_a_help(use: Use) -> None:
    if isinstance(use.action, argparse._VersionAction):
        return
    assert use.action.help, use


@pytest.mark.parametrize(("command", "parser"), list(parsers()), ids=lambda value: str(value)[:40])
def test_options_cannot_be_abbreviated(command: str, parser: argparse.ArgumentParser) -> None:
    assert not parser.allow_abbrev, command


@pytest.mark.parametrize("option", list(options()), ids=lambda option: option.key)
def test_the_configuration_has_the_defaults_of_the_commands(option: Option) -> None:
    name = "--" + option.key.replace("_", "-")
    if "default" in OPTIONS.get(name, {}) and ("reclaimd", name) not in DEFAULT_EXCEPTIONS:
        assert read_flag(option, str(OPTIONS[name]["default"])) == option.default


def test_exceptions_are_still_needed() -> None:
    there = {(use.command, use.name) for use in ALL}
    for listed in (DEFAULT_EXCEPTIONS, FORM_EXCEPTIONS, NEGATIVE):
        assert set(listed) <= there, set(listed) - there
    assert set(OWN_DEFAULTS) <= set(OF_NAME)


@pytest.mark.parametrize(("command", "parser"), list(parsers()), ids=lambda value: str(value)[:40])
def test_every_command_has_a_description(command: str, parser: argparse.ArgumentParser) -> None:
    assert parser.description, command
