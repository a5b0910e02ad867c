"""What is made from the commands' parsers: one-line errors, completion, manual pages."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvmhost import __version__
from kvmhost.errors import LayoutError
from kvmhost.tools import completion, man
from kvmhost.tools.main import main
from kvmhost.tools.tree import commands, find, full_parser

COMMANDS = list(commands())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: "-".join(c.words))
def test_every_command_has_a_parser_of_its_name(command: object) -> None:
    parser = command.parser()  # type: ignore[attr-defined]
    assert parser.prog == " ".join(("kvmhost", *command.words))  # type: ignore[attr-defined]
    assert parser.description


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("helpp", "unknown command 'helpp', did you mean 'help'?"),
        ("--verson", "unknown option '--verson', did you mean '--version'?"),
        ("run hello --trackr x", "unrecognized arguments: --trackr x, did you mean '--tracker'?"),
        ("run hello --engine kv", "invalid choice 'kv', did you mean 'kvm'?"),
        ("run hello --mem 12Q", "argument --mem: "),
        ("run helo", "unknown guest 'helo', did you mean 'hello'?"),
        ("young heatmp", "unknown name 'heatmp', did you mean 'heatmap'?"),
        ("bench walks", "unknown name 'walks', did you mean 'walk'?"),
        ("bench mmu --part scann", "unknown part 'scann', did you mean 'scan'?"),
        ("bench harvest --tracker dity", "unknown tracker 'dity', did you mean 'dirty'?"),
        ("reclaimd vm --budget 1M --policy lru", "unknown policy 'lru', did you mean 'lru_gen'?"),
        ("lru_gen shwo", "invalid choice 'shwo', did you mean 'show'?"),
        ("docs yuong", "unknown page 'yuong', did you mean 'young'?"),
        ("man young hetmap", "unknown command 'hetmap', did you mean 'heatmap'?"),
    ],
)
def test_a_wrong_argument_is_one_line(
    words: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    shown = capsys.readouterr()
    assert line in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_help_of_a_command_by_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for words in (["help", "young", "heatmap"], ["young", "heatmap", "--help"]):
        assert main(words) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert shown[0].startswith("usage: kvmhost young heatmap")


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert main(["reclaimd", "--version"]) == 0
    assert capsys.readouterr().out == f"kvmhost {__version__}\nreclaimd {__version__}\n"


def test_the_full_parser_takes_what_the_commands_take() -> None:
    given = full_parser().parse_args(["young", "heatmap", "vm1", "-o", "x.png"])
    assert (given.command, given.name, str(given.out)) == ("young", "heatmap", "x.png")


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_script_names_every_command(shell: str) -> None:
    text = completion.script(shell)
    assert all(word in text for command in COMMANDS for word in command.words)
    assert "kvmhost completion --words guests" in text


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("kvmhost recl", "reclaimd"),
        ("kvmhost young he", "heatmap"),
        ("kvmhost run hotc", "hotcold"),
        ("kvmhost run hello --eng", "--engine"),
        ("kvmhost run hello --engine k", "kvm"),
        ("kvmhost run hello --tracker pa", "pagemap"),
        ("kvmhost docs archi", "architecture"),
    ],
)
def test_bash_completes(line: str, found: str, tmp_path: Path) -> None:
    script = tmp_path / "script.bash"
    script.write_text(completion.script("bash"))
    command = tmp_path / "kvmhost"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m kvmhost "$@"\n')
    command.chmod(0o755)
    words = line.split()
    asked = f"""
        PATH={tmp_path}:$PATH; source {script}
        COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}
        _shtab_kvmhost kvmhost {words[-1]} {words[-2]} 2>/dev/null; echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
    assert done.stdout.split() == [found], done.stderr


def test_words_of_virtual_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvmhost.control.paths import NameLock

    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(tmp_path))
    lock = NameLock("vm-of-a-test")
    assert main(["completion", "--words", "vms"]) == 0
    lock.release()
    assert capsys.readouterr().out == "vm-of-a-test\n"


def test_manual_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["man", "-o", str(tmp_path / "man1")]) == 0
    names = {path.name for path in (tmp_path / "man1").iterdir()}
    expected = {"-".join(("kvmhost", *command.words)) + ".1" for command in COMMANDS}
    assert names == expected | {"kvmhost.1", "reclaimd.1"}
    capsys.readouterr()
    assert main(["man", "young", "heatmap"]) == 0
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "man1" / "kvmhost-young-heatmap.1").read_text()
    assert r"kvmhost\-young\-heatmap \- a picture, gfn by time" in shown
    assert main(["man", "-o", "/proc/none"]) == 2


def test_troff_has_no_complaint() -> None:
    if shutil.which("groff") is None:
        pytest.skip("no groff; install it to check the manual pages")
    for name, text in man.pages().items():
        if text.startswith(".so "):
            continue
        done = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", "-Kutf8"], input=text, capture_output=True, text=True
        )
        complaints = [line for line in done.stderr.splitlines() if "break" not in line]
        assert complaints == [], name
        assert done.stdout


def test_the_exit_codes_are_in_the_manual(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["man"]) == 0
    shown = capsys.readouterr().out
    assert ".SH EXIT STATUS" in shown
    assert ".B 126\na capability is missing" in shown


def test_find_names_what_is_unknown() -> None:
    assert find(["young", "stat"]).module == "kvmhost.tools.young.stat"
    with pytest.raises(LayoutError, match="did you mean 'young'"):
        find(["yong"])


def test_documents(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs"]) == 0
    listed = capsys.readouterr().out
    assert "  architecture" in listed
    assert "  examples/own_policy/kvmhost_fifo.py  A policy that evicts" in listed
    assert "  A look at a record\n" in listed
    assert main(["docs", "architecture", "--path"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert main(["docs", "architecture.md"]) == 0
    assert capsys.readouterr().out == path.read_text()
    assert main(["docs", "--path"]) == 0
    assert Path(capsys.readouterr().out.strip()) == path.parent
