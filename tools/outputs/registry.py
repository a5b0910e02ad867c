"""Which structure each command prints with ``--json``, and which commands have no ``--json``."""

from __future__ import annotations

import dataclasses

import msgspec

from kvmhost.control import schema
from kvmhost.tools.bench import SUBCOMMANDS
from kvmhost.tools.outputs import daemons, host, lab, records, vms, young

__all__ = ["OUTPUTS", "REPORTS", "WITHOUT_JSON", "Shape"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a command prints: one object, or one per event as JSON lines.

    :ivar per: what each line is about; empty: one object
    """

    of: type[msgspec.Struct]
    per: str = ""


#: By command.
OUTPUTS = {
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
    "lru_gen run": Shape(daemons.EvictedOutput),
    "lru_gen show": Shape(daemons.GenerationsOutput),
    "page": Shape(daemons.PageOutput),
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

#: Commands whose ``--json`` is not described yet, and what it is.
REPORTS = {
    "accuracy": "one object: precision, recall, cost and throughput by workload and tracker",
    "demo": "one object: what the demonstration measured, and `ok`",
    "reclaimd": "JSON lines, one per event of the log; `event` is pass, dropped, notice or log",
    **{
        f"bench {name}": "one object: figures of the benchmark, which change with what it measures"
        for name in SUBCOMMANDS
    },
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
