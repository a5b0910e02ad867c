"""What the aging of an emulated host's own kernel does to the accessed bits of a guest, pictured.

    kvmhost lab fetch amd64-6.12 amd64-7.3
    python docs/examples/kernel_aging.py amd64-6.12,amd64-7.3 -o kernel_aging.png

A guest touches every third page of a range, and stops. Then the host's kernel ages memory, one
step at a time, and after each step its KVM's tables are read from outside: which pages are still
young there. Nothing is cleared from outside, except in the first step of each row.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
from matplotlib import colors, figure

from kvmhost.guests import image_path
from kvmhost.lab.hosts import find_host
from kvmhost.lab.tables import GuestTables, open_tables

LRU_GEN = "/sys/kernel/debug/lru_gen"
#: Adds a generation to the guest's cgroup: min and max generation are the first fields of rows.
AGE = f"""
id=$(awk '$1=="memcg" && $3=="/guest" {{print $2}}' {LRU_GEN})
max=$(awk '$1=="memcg" {{m=$3}} m=="/guest" && $1 ~ /^[0-9]+$/ {{x=$1}} END {{print x}}' {LRU_GEN})
echo "+ $id 0 $max 1 1" > {LRU_GEN} && echo aged $max
"""
#: Evicts the oldest generation of it, up to one page: each candidate is looked at by rmap.
EVICT = f"""
id=$(awk '$1=="memcg" && $3=="/guest" {{print $2}}' {LRU_GEN})
min=$(awk '$1=="memcg" {{m=$3}} m=="/guest" && $1 ~ /^[0-9]+$/ {{print $1; exit}}' {LRU_GEN})
echo "- $id 0 $min 200 1" > {LRU_GEN}; echo evict $min
"""
#: The parent of the shell is the agent, in whose process the guest lives.
CLEAR_REFS = "echo 1 > /proc/$PPID/clear_refs"
STEPS = (
    ("the guest's epoch", None),
    ("clear_refs", CLEAR_REFS),
    ("lru_gen: age", AGE),
    ("lru_gen: age", AGE),
    ("lru_gen: evict", EVICT),
    ("the guest's epoch", None),
    ("lru_gen: age", AGE),
)


def main() -> None:
    """Run each host and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hosts", metavar="HOST,...")
    parser.add_argument("-o", "--out", default="kernel_aging.png", metavar="FILE")
    parser.add_argument("--timeout", type=float, default=3000.0, metavar="SECONDS")
    args = parser.parse_args()
    rows = {}
    for name in args.hosts.split(","):
        options = {"n_pages": 1536, "image": str(image_path("touch")), "cgroup": "guest"}
        with open_tables(find_host(name), options, timeout_s=args.timeout) as tables:
            tables.ask("shell", command="echo 7 > /sys/kernel/mm/lru_gen/enabled")
            rows[name] = np.stack(list(observe(tables)), axis=1)
    draw(rows, args.out)


def observe(tables: GuestTables) -> Iterator[np.ndarray]:
    """Yield the state of each touched page after each step: 0 not mapped, 1 old, 2 young."""
    touched = tables.run_epoch()
    start, n_pages = touched[0], touched[-1] - touched[0] + 1
    tables.harvest(start, n_pages)
    for label, command in STEPS:
        if command is None:
            tables.run_epoch()
        else:
            print(label, tables.ask("shell", command=command), flush=True)
        table = tables.table()
        mapped = np.array([table.leaf(gfn) is not None for gfn in touched])
        young = np.isin(touched, tables.harvest(start, n_pages, clear=False).gfns())
        print(f"{label}: {young.sum()} young, {mapped.sum()} mapped", flush=True)
        yield mapped + young.astype(int)


def draw(rows: dict[str, np.ndarray], path: str) -> None:
    """Draw one panel per host: pages upward, steps to the right."""
    picture = figure.Figure(figsize=(5.2 * len(rows) + 1, 5), dpi=110, layout="constrained")
    for axes, (name, states) in zip(
        picture.subplots(1, len(rows), sharey=True, squeeze=False)[0], rows.items(), strict=True
    ):
        axes.imshow(
            states,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            cmap=colors.ListedColormap(["#c0392b", "#e3e3e3", "#1f5f8b"]),
            vmin=0,
            vmax=2,
        )
        axes.set_title(f"{name}: {states.shape[0]} touched pages", loc="left", fontsize=10)
        n_young = (states == 2).sum(axis=0)
        labels = [f"{label}\n{n} young" for (label, _), n in zip(STEPS, n_young, strict=True)]
        axes.set_xticks(range(len(STEPS)), labels, rotation=40, ha="right", fontsize=8)
        for edge in range(1, len(STEPS)):
            axes.axvline(edge - 0.5, color="white", linewidth=2)
    picture.axes[0].set_ylabel("touched pages, by gfn")
    title = "Pages in KVM's own tables after each step: young (blue), old (grey), not mapped (red)"
    picture.suptitle(title, fontsize=11)
    picture.savefig(path)


if __name__ == "__main__":
    main()
