"""One verdict per feature of kvmhost, derived from the findings of ``kvmhost doctor``."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence

from kvmhost.doctor import Finding
from kvmhost.installing import install_hint

__all__ = ["Verdict", "verdicts"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a feature works on this host.

    :ivar why: how it works, or why it does not
    :ivar remedy: how to fix it; empty if the feature works
    """

    feature: str
    works: bool
    why: str
    remedy: str = ""

    def line(self) -> str:
        """Return the verdict as one line."""
        if self.works:
            return f"{self.feature}: yes, {self.why}" if self.why else f"{self.feature}: yes"
        return f"{self.feature}: no, because {self.why}; {self.remedy or 'there is no remedy'}"


def verdicts(findings: Sequence[Finding]) -> list[Verdict]:
    """Return a verdict for each feature; the names are stable.

    ``run kvm``, ``run emulated``, ``reclaim``, ``tracker NAME``, ``cgroup limits``,
    ``psi``, ``lab``, ``pictures``, ``records``.
    """
    by_name = {(finding.area, finding.name): finding for finding in findings}
    shown = [_of(by_name, f"run {name}", "engine", name) for name in ("kvm", "emulated")]
    shown.append(_reclaim(by_name))
    shown += [_tracker(finding) for finding in findings if finding.area == "tracker"]
    shown += [_cgroups(by_name), _psi(by_name), _lab(by_name)]
    shown.append(_package("pictures", "matplotlib", "plot"))
    shown.append(_package("records", "zstandard", "record"))
    return shown


_Findings = Mapping[tuple[str, str], Finding]


def _of(findings: _Findings, feature: str, area: str, name: str) -> Verdict:
    finding = findings.get((area, name), Finding(area, name, False, "it was not tried"))
    why = "" if finding.works and finding.found == "works" else finding.found
    return Verdict(feature, bool(finding.works), why, "" if finding.works else finding.remedy)


def _tracker(finding: Finding) -> Verdict:
    feature = f"tracker {finding.name}"
    if finding.works:
        # A limitation is shown in brackets; --all shows its remedy.
        return Verdict(feature, True, finding.found.partition(" (")[0])
    why, _, remedy = finding.found.removeprefix(f"{finding.name}: ").partition("; ")
    why = why.replace("need ", "it needs ", 1) if why.startswith("need ") else why
    return Verdict(feature, False, why, remedy or finding.remedy)


def _reclaim(findings: _Findings) -> Verdict:
    """Eviction requires an engine, and a userfaultfd to fault pages back in."""
    engines = [_of(findings, "", "engine", name) for name in ("kvm", "emulated")]
    if not any(engine.works for engine in engines):
        return Verdict("reclaim", False, "no engine works", engines[0].remedy)
    userfault = _of(findings, "reclaim", "memory", "userfaultfd")
    return dataclasses.replace(userfault, why="" if userfault.works else userfault.why)


def _cgroups(findings: _Findings) -> Verdict:
    tried = [_of(findings, "cgroup limits", "pressure", f"cgroup {v} memory") for v in ("v2", "v1")]
    return next((verdict for verdict in tried if verdict.works), tried[0])


def _psi(findings: _Findings) -> Verdict:
    read = _of(findings, "psi", "pressure", "PSI")
    trigger = _of(findings, "psi", "pressure", "PSI trigger")
    if not read.works:
        return read
    how = "totals and triggers" if trigger.works else f"totals only, no triggers: {trigger.why}"
    return Verdict("psi", True, how)


def _lab(findings: _Findings) -> Verdict:
    """An emulated host requires its QEMU, and a kernel from the cache or a mirror."""
    emulators = [_of(findings, "lab", *key) for key in findings if key[1].startswith("qemu-system")]
    works = [emulator for emulator in emulators if emulator.works]
    if not works:
        tried = emulators[0] if emulators else _of(findings, "lab", "lab", "qemu-system-x86_64")
        return dataclasses.replace(tried, feature="lab")
    fetching = _of(findings, "lab", "lab", "fetching")
    cached = findings.get(("lab", "cached hosts"))
    if not fetching.works and (cached is None or cached.found == "none"):
        return fetching
    names = [key[1] for key in findings if key[1].startswith("qemu-system") and findings[key].works]
    return Verdict("lab", True, ", ".join(names))


def _package(feature: str, module: str, extra: str) -> Verdict:
    if importlib.util.find_spec(module) is not None:
        return Verdict(feature, True, "")
    return Verdict(feature, False, f"the package {module} is missing", install_hint(extra))
