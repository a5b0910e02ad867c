"""``kvmhost doctor``: report what works on this host and how to fix the rest."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence

from kvmhost.doctor import Finding, probe_host
from kvmhost.printable import printable
from kvmhost.reclaim.pressure import probe
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.host import DoctorOutput, FeatureRow, FindingRow
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.verdicts import verdicts
from kvmhost.tools.vocabulary import add_option

__all__ = ["main", "parser"]

EXIT_MISSING = 126

_DESCRIPTION = """\
Try everything that kvmhost uses: /dev/kvm and its capabilities, engines,
trackers, userfaultfd, compression, memory cgroups, PSI. Each line is a verdict on
one feature and says, where it does not work, why and what to do about it; --all
lists everything that was tried. Nothing is changed.

exit status: 0 if at least one engine works, 126 if none does
"""


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost doctor",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--all", action="store_true", help="list everything that was tried")
    add_option(parser, "--json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Probe, print, and return 0 if a guest can run on this host, else 126."""
    arguments = parser().parse_args(argv)
    findings = [*probe_host(), *_pressure()]
    usable = any(f.works for f in findings if f.area == "engine")
    if arguments.json:
        emit(_report(usable, findings))
    elif not arguments.all:
        for verdict in verdicts(findings):
            print(verdict.line())
    elif sys.stdout.isatty():
        _print_table(findings)
    else:
        _print_plain(findings)
    return 0 if usable else EXIT_MISSING


def _report(usable: bool, findings: list[Finding]) -> DoctorOutput:
    """Return the output of ``--json``: features by name, and all findings."""
    return DoctorOutput(
        usable=usable,
        features={
            verdict.feature.replace(" ", "_"): FeatureRow(
                works=verdict.works, why=verdict.why, remedy=verdict.remedy
            )
            for verdict in verdicts(findings)
        },
        findings=[FindingRow(**dataclasses.asdict(finding)) for finding in findings],
    )


def _pressure() -> list[Finding]:
    probes: dict[str, Callable[[], tuple[bool, str, str]]] = {
        "cgroup v1 memory": probe.probe_cgroup_v1,
        "cgroup v2 memory": probe.probe_cgroup_v2,
        "PSI": probe.probe_psi,
        "PSI trigger": probe.probe_psi_trigger,
        "swap": probe.probe_swap,
    }
    return [Finding("pressure", name, *attempt()) for name, attempt in probes.items()]


def _mark(finding: Finding) -> str:
    return {True: "yes", False: "no", None: "-"}[finding.works]


def _print_plain(findings: list[Finding]) -> None:
    area_width = max(len(f.area) for f in findings)
    name_width = max(len(f.name) for f in findings)
    for f in findings:
        remedy = f" ({f.remedy})" if f.remedy else ""
        start = f"{f.area:<{area_width}}  {f.name:<{name_width}}  {_mark(f):<3}"
        print(f"{start}  {printable(f.found + remedy)}")


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Four columns fit in 80 characters; the remedy is printed below the finding.
    table = Table()
    for heading in ("area", "what", "works"):
        table.add_column(heading, no_wrap=True)
    table.add_column("found, and what to do", overflow="fold")
    style = {True: "green", False: "red", None: "dim"}
    for f in findings:
        # Text instead of markup: messages of the kernel may contain brackets.
        mark = Text(_mark(f), style[f.works])
        found = Text(printable(f.found))
        if f.remedy:
            found.append(f"\n→ {printable(f.remedy)}", "yellow")
        table.add_row(f.area, f.name.removeprefix("KVM_CAP_"), mark, found)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
