"""``kvmhost bench NAME``: measurements, each a ratio of two variants in one run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

__all__ = ["BENCHES", "main"]

#: Name: its module in this package, and one line about it.
BENCHES = {
    "walk": ("bench_walk", "harvest over live entries against a plain sum and a bare atomic loop"),
    "exits": ("bench_exits", "port exits in the C loop and in Python against a minimal C loop"),
    "harvest": (
        "bench_harvest",
        "trackers on a 1 GiB guest: scan, re-arm, and what the guest pays",
    ),
    "start": ("bench_start", "kvmhost run hello: wall time of the whole process"),
    "mmu": ("bench_mmu", "tables in all formats: speed, locking, batching"),
}


def main(argv: Sequence[str]) -> int:
    """Run one benchmark; its own ``--help`` tells its options."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<8} {text}" for name, (_, text) in BENCHES.items())
        print(f"usage: kvmhost bench NAME [options]\n\n{__doc__}\n\nnames:\n{lines}")
        return 0 if argv else 2
    if argv[0] not in BENCHES:
        print(f"kvmhost bench: no benchmark {argv[0]!r}: {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"tools.{BENCHES[argv[0]][0]}")
    run: Callable[[Sequence[str]], int] = module.main
    return run(argv[1:])
