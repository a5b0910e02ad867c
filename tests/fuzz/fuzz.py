"""Coverage-guided fuzzing: ``python tests/fuzz/fuzz.py loaders -max_total_time=600``.

The targets are those of ``targets.py``. Needs atheris (PyPI), which is no dependency of
the tests. What comes after the target goes to libFuzzer, a corpus directory first for
example; the target's seeds are added to it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvmhost"]):
    from targets import SEEDS, TARGETS


def main() -> None:
    """Fuzz one target."""
    target = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(SEEDS.get(target, [])):
            (Path(folder) / f"seed{number}").write_bytes(seed)
        atheris.Setup([sys.argv[0], *sys.argv[2:], folder], TARGETS[target])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
