"""The examples in docstrings and on the page: those that need no VM run, and so does the page's."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MODULES = sorted(path.stem for path in (ROOT / "kvmhost" / "kvm").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    module = importlib.import_module(f"kvmhost.kvm.{name}")
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0


@pytest.mark.requires_kvm
@pytest.mark.requires_cap("BINARY_STATS_FD")
def test_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "kvm-api.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(code) == 1
    exec(compile(code[0], "kvm-api.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "rip=0x1000, rflags=2" in shown
