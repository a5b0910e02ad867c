"""``kvmhost doctor`` tells the truth, in every form of output."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from json_page import checked

from kvmhost.doctor import Finding
from kvmhost.reclaim.pressure import probe
from kvmhost.tools import doctor
from kvmhost.tools.verdicts import verdicts

pytestmark = pytest.mark.usefixtures("nothing_left")


def findings(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    (shown,) = checked("doctor", capsys.readouterr().out)
    return {f"{f['area']} {f['name']}": f for f in shown["findings"]}


def test_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    found = findings(capsys)
    assert found["host kernel"]["found"] == os.uname().release
    assert found["engine emulated"]["works"] is True
    assert {"memory userfaultfd", "memory compression lz4", "pressure PSI"} <= set(found)
    assert all(f["remedy"] for f in found.values() if f["works"] is False)


@pytest.mark.requires_kvm
@pytest.mark.requires_cap("BINARY_STATS_FD")
def test_kvm_is_told_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--json"])
    found = findings(capsys)
    assert found["kvm KVM_CAP_BINARY_STATS_FD"]["found"] == "1"
    offered = str(found["kvm capabilities"]["found"]).split(", ")
    assert {"HLT", "USER_MEMORY", "BINARY_STATS_FD"} <= set(offered)
    assert not set(offered) & set(str(found["kvm not offered"]["found"]).split(", "))
    assert str(found["kvm statistics"]["found"]).endswith("of a vCPU")


def test_hidden_kvm_is_told_with_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMHOST_HIDE_KVM", "1")
    assert doctor.main(["--json"]) == 0  # the other engine works
    kvm = findings(capsys)["engine kvm"]
    assert kvm["works"] is False
    assert kvm["remedy"] == "unset KVMHOST_HIDE_KVM"


def test_no_engine_is_126(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = [Finding("engine", name, False, "gone", "buy one") for name in ("kvm", "emulated")]
    monkeypatch.setattr(doctor, "probe_host", lambda: iter(nothing))
    assert doctor.main(["--all"]) == 126
    assert "gone (buy one)" in capsys.readouterr().out


def test_table_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert doctor.main(["--all"]) == 0
    assert "emulated" in capsys.readouterr().out


def test_a_verdict_for_each_feature(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    features = checked("doctor", capsys.readouterr().out)[0]["features"]
    names = {
        "run_kvm",
        "run_emulated",
        "reclaim",
        "cgroup_limits",
        "psi",
        "lab",
        "pictures",
        "records",
    }
    assert names | {"tracker_guestpt", "tracker_pagemap", "tracker_uffd"} <= set(features)
    assert all(set(found) == {"works", "why", "remedy"} for found in features.values())
    assert all(found["remedy"] for found in features.values() if not found["works"])
    doctor.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(features)
    for line, (name, found) in zip(lines, features.items(), strict=True):
        assert line.startswith(f"{name.replace('_', ' ')}: {'yes' if found['works'] else 'no, '}")


def test_verdicts_name_the_cause_and_what_to_do() -> None:
    need = "userfaultfd needs faults, found EPERM; run as root"
    found = [
        Finding("engine", "kvm", False, "/dev/kvm: Permission denied", "join kvm"),
        Finding("engine", "emulated", True, "works"),
        Finding("memory", "userfaultfd", False, "Operation not permitted", "add a udev rule"),
        Finding("tracker", "uffd", False, need, "none needed"),
        Finding("pressure", "PSI", True, "some avg10=0"),
        Finding("pressure", "PSI trigger", False, "not allowed", "run as root"),
        Finding("pressure", "cgroup v2 memory", False, "not mounted", "mount it"),
        Finding("pressure", "cgroup v1 memory", True, "groups can be made"),
    ]
    lines = [verdict.line() for verdict in verdicts(found)]
    assert lines[0] == "run kvm: no, because /dev/kvm: Permission denied; join kvm"
    assert lines[1] == "run emulated: yes"
    assert lines[2] == "reclaim: no, because Operation not permitted; add a udev rule"
    assert lines[3] == (
        "tracker uffd: no, because userfaultfd needs faults, found EPERM; run as root"
    )
    assert lines[4] == "cgroup limits: yes, groups can be made"
    assert lines[5] == "psi: yes, totals only, no triggers: not allowed"
    gone = [Finding("engine", name, False, "gone", "buy one") for name in ("kvm", "emulated")]
    assert verdicts(gone)[2].line() == "reclaim: no, because no engine works; buy one"


def lab_verdict(**changes: tuple[bool | None, str]) -> str:
    found = {"qemu-system-a": (False, "gone"), "qemu-system-b": (True, "version 7")}
    found |= {"fetching": (True, "apt"), "cached hosts": (None, "none")}
    found |= {name.replace("_", "-"): value for name, value in changes.items()}
    findings = [Finding("lab", name, *value, "do it") for name, value in found.items()]
    (line,) = [v.line() for v in verdicts(findings) if v.feature == "lab"]
    return line


def test_the_lab_needs_an_emulator_and_a_kernel() -> None:
    assert lab_verdict() == "lab: yes, qemu-system-b"
    assert lab_verdict(qemu_system_b=(False, "gone")) == "lab: no, because gone; do it"
    assert lab_verdict(fetching=(False, "no apt-get")) == "lab: no, because no apt-get; do it"
    from_cache = {"fetching": (False, "no apt-get"), "cached hosts": (None, "amd64-6.1")}
    assert lab_verdict(**from_cache) == "lab: yes, qemu-system-b"


def test_help_names_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        doctor.main(["--help"])
    assert "126 if none does" in capsys.readouterr().out


def test_probes_say_why_not(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for works, found, remedy in (
        probe.probe_cgroup_v1(absent),
        probe.probe_cgroup_v2((absent,)),
        probe.probe_psi(absent),
        probe.probe_psi_trigger(absent),
        probe.probe_swap(absent),
    ):
        assert not works
        assert found
        assert remedy


def test_v2_without_the_memory_controller(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu io\n")
    works, found, _ = probe.probe_cgroup_v2((tmp_path,))
    assert (works, found) == (False, f"{tmp_path} has no memory controller")


def test_a_group_without_its_limit_file_does_not_stay(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("memory\n")
    works, _, _ = probe.probe_cgroup_v2((tmp_path,))
    assert not works
    assert [path.name for path in tmp_path.iterdir()] == ["cgroup.controllers"]


@pytest.mark.parametrize(
    ("text", "works"),
    [("Filename\tType\n", False), ("Filename\tType\n/dev/sda2 partition\n", True)],
)
def test_swap(tmp_path: Path, text: str, works: bool) -> None:
    swaps = tmp_path / "swaps"
    swaps.write_text(text)
    assert probe.probe_swap(swaps)[0] is works
