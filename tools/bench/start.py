"""``kvmhost bench start``: wall time of whole ``kvmhost run hello`` processes.

Beside it, in turn, the same interpreter starting to do nothing, which is the
part that nothing here can save.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

__all__ = ["main", "run"]


def run(repeats: int = 10, engine: str = "auto") -> dict[str, Any]:
    """Measure; medians in seconds."""
    commands = {
        "python": [sys.executable, "-c", "pass"],
        "hello": [sys.executable, "-m", "tools.main", "run", "hello", "--engine", engine],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - start)
    return {
        "repeats": repeats,
        "engine": engine,
        "python_s": statistics.median(times["python"]),
        "hello_s": statistics.median(times["hello"]),
        "hello_max_s": max(times["hello"]),
    }


def main(argv: Sequence[str]) -> int:
    """Print the figures as text, or as JSON."""
    parser = argparse.ArgumentParser(prog="kvmhost bench start", description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--engine", default="auto", choices=("auto", "kvm", "emulated"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    result = run(options.repeats, options.engine)
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    print(
        f"kvmhost run hello: {result['hello_s']:.3f} s median of {result['repeats']}, "
        f"{result['hello_max_s']:.3f} s at most"
    )
    print(f"python -c pass:    {result['python_s']:.3f} s")
    return 0
