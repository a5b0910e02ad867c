"""Which structure each command prints with ``--json``, and which commands have no ``--json``."""

from __future__ import annotations

import dataclasses

import msgspec

from kvmhost.control import schema
from kvmhost.tools.outputs import (
    accuracy,
    bench,
    benchparts,
    daemons,
    host,
    lab,
    records,
    stress,
    vms,
    young,
)

__all__ = ["OUTPUTS", "WITHOUT_JSON", "Shape"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a command prints: one object, or one per event as JSON lines.

    :ivar per: what each line is about; empty: one object
    """

    of: type[msgspec.Struct]
    per: str = ""


#: By command.
OUTPUTS = {
    "accuracy": Shape(accuracy.AccuracyOutput),
    "bench exits": Shape(bench.ExitsOutput),
    "bench harvest": Shape(bench.HarvestOutput),
    "bench mmu": Shape(benchparts.MmuOutput),
    "bench pager": Shape(benchparts.PagerOutput),
    "bench reclaim": Shape(benchparts.ReclaimOutput),
    "bench sampling": Shape(bench.SamplingOutput),
    "bench snapshot": Shape(bench.SnapshotBenchOutput),
    "bench start": Shape(bench.StartOutput),
    "bench trackers": Shape(bench.TrackersOutput),
    "bench views": Shape(bench.ViewsOutput),
    "bench walk": Shape(bench.WalkOutput),
    "bench young": Shape(bench.YoungOutput),
    "demo": Shape(accuracy.DemoOutput),
    "doctor": Shape(host.DoctorOutput),
    "guests": Shape(host.GuestsOutput),
    "run": Shape(host.RunReport),
    "limit": Shape(schema.LimitState),
    "drain": Shape(schema.RestoreReport),
    "list": Shape(vms.ListOutput),
    "pause": Shape(vms.RunOutput),
    "resume": Shape(vms.RunOutput),
    "stop": Shape(vms.StopOutput),
    "lab list": Shape(lab.LabListOutput),
    "lru_gen enabled": Shape(daemons.EnabledOutput),
    "lru_gen run": Shape(daemons.EvictedOutput),
    "lru_gen show": Shape(daemons.GenerationsOutput),
    "page": Shape(daemons.PageOutput),
    "reclaimd": Shape(daemons.EventOutput, per="event"),
    "stress": Shape(stress.StressOutput),
    "snapshot": Shape(vms.SnapshotOutput),
    "young ages": Shape(young.AgesOutput),
    "young compare": Shape(records.CompareOutput),
    "young diff": Shape(young.DiffOutput),
    "young export": Shape(young.ExportOutput),
    "young gfn": Shape(young.PlaceOutput),
    "young hot": Shape(young.HotOutput),
    "young import": Shape(young.ImportOutput),
    "young page": Shape(young.YoungPageOutput),
    "young record": Shape(young.RecordOutput, per="VM"),
    "young snapshot": Shape(young.YoungSnapshotOutput),
    "young stat": Shape(records.StatOutput),
    "young whatif": Shape(records.WhatifOutput),
    "young wss": Shape(young.WorkingSetOutput),
}

#: Commands without ``--json``, and why.
WITHOUT_JSON = {
    "completion": "prints a script for a shell",
    "docs": "shows pages for people",
    "guests build": "writes a file, and its exit code says whether it did",
    "lab fetch": "fills the cache; lab list --json says what is in it",
    "lab run": "passes on what the command inside prints",
    "lab shell": "is a terminal",
    "lab young": "writes a record (--out), which the commands of young read",
    "man": "shows pages for people",
    "top": "draws on a terminal; list has the same",
    "young heatmap": "writes a picture",
    "young watch": "draws on a terminal",
}
