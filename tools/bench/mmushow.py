"""Tables of ``kvmhost bench mmu``."""

from __future__ import annotations

from collections.abc import Sequence

from kvmhost.tools.outputs.benchparts import (
    AgingRow,
    ChangeRow,
    MmuOutput,
    ScaleRow,
    ScanRow,
    SparseRow,
    WayRow,
)

__all__ = ["sentence", "show"]


def show(result: MmuOutput) -> None:
    """Print the parts that a result has."""
    _show_scan(result.scan)
    _show_sparse(result.sparse)
    _show_scale(result.scale)
    _show_aging(result.aging)
    _show_ways(result.ways, result.changes)


def _show_scan(rows: Sequence[ScanRow]) -> None:
    if rows:
        print("-- scan")
        print("format   old, of a sum   of a wide sum   young, times a bare and-loop")
    for r in rows:
        print(
            f"{r.table_format:8} {r.old_of_sum_ratio:13.2f} {r.old_of_wide_sum_ratio:15.2f} "
            f"{r.young_of_and_ratio:13.2f}   "
            f"({r.old_ns_per_entry:.2f} and {r.young_ns_per_entry:.2f} ns an entry)"
        )


def _show_sparse(rows: Sequence[SparseRow]) -> None:
    if rows:
        print("-- sparse")
    for r in rows:
        print(
            f"{r.table_format:8} 1 GiB in {r.space_gib} GiB takes {r.sparse_of_alone_ratio:.2f} "
            f"times 1 GiB alone ({r.sparse_us:.0f} and {r.alone_us:.0f} us)"
        )


def _show_scale(rows: Sequence[ScaleRow]) -> None:
    if rows:
        print("-- scale")
    for r in rows:
        million = r.n_entries / 1e6
        print(
            f"{r.guest_gib} GiB of guest, {r.n_entries:,} entries, {r.table_bytes / 2**30:.2f} GiB "
            f"of tables, {r.resident_bytes / 2**30:.2f} GiB resident: built in {r.build_s:.1f} s "
            f"({million / r.build_s:.0f} M entries/s), "
            f"harvested young in {r.harvest_young_s:.2f} s "
            f"({million / r.harvest_young_s:.0f} M/s), "
            f"old in {r.harvest_old_s:.2f} s ({million / r.harvest_old_s:.0f} M/s)"
        )


def _show_aging(rows: Sequence[AgingRow]) -> None:
    if rows:
        print("-- aging")
        print("vCPUs   none   locked (pass, slowdown)        lockless (pass, slowdown)")
    for n in dict.fromkeys(row.n_vcpus for row in rows):
        by_kind = {row.aging: row for row in rows if row.n_vcpus == n}
        cells = [
            f"   {r.vcpu_s:6.2f} s ({r.pass_s * 1e3:7.2f} ms, {r.slowdown_ratio:.2f}x)"
            for r in (by_kind["locked"], by_kind["lockless"])
        ]
        print(f"{n:>5} {by_kind['none'].vcpu_s:6.2f}" + "".join(cells))


def _show_ways(ways: Sequence[WayRow], changes: Sequence[ChangeRow]) -> None:
    if ways:
        print("-- ways")
    for name in dict.fromkeys(way.table_format for way in ways):
        print(f"{name:28} ns a page   vCPU slowdown")
        for way in (way for way in ways if way.table_format == name):
            print(f"  {_way_name(way):26} {way.ns_per_page:9.1f} {way.slowdown_ratio:12.2f}")
        print(f"  {sentence(name, [row for row in changes if row.table_format == name])}")


def _way_name(way: WayRow) -> str:
    return " ".join(
        [
            "per-page" if way.batch_pages == 1 else "batched",
            "locked" if way.locked else "lockless",
            "flush" if way.flush else "no-flush",
        ]
    )


def sentence(name: str, changes: Sequence[ChangeRow]) -> str:
    """Return what each change brings, the largest first."""
    parts = [
        f"{row.change} divides the cost of aging a page by {row.cost_ratio:.1f} "
        f"({row.min_cost_ratio:.1f} to {row.max_cost_ratio:.1f}) and the vCPU's time by "
        f"{row.vcpu_ratio:.2f}"
        for row in sorted(changes, key=lambda row: -row.cost_ratio)
    ]
    return f"{name}: " + "; ".join(parts) + "."
