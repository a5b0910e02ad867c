"""The examples and the README's Python are typed as their readers' code will be: mypy --strict."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_pages import ROOT

pytest.importorskip("mypy")
EXAMPLES = ROOT / "docs" / "examples"


def test_examples_readme_and_plug_in_pass_mypy_strict(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    readme = tmp_path / "readme.py"
    readme.write_text("\n".join(blocks))
    files = [readme, *sorted(EXAMPLES.rglob("*.py"))]
    assert {"first_program.py", "kvmhost_fifo.py"} <= {path.name for path in files}
    words = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([*words, *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
