"""kvmhost inside the emulated AMD hosts, as a user runs it, and its KVM tests there."""

from __future__ import annotations

import subprocess
import sys

import pytest
from waiting import DEADLINE_S

SLOW = pytest.mark.slow
HOSTS = ["amd64-6.1", pytest.param("amd64-6.12", marks=SLOW), pytest.param("amd64-7.3", marks=SLOW)]
#: What one boot shows: KVM's paging, both streams, a guest, a status, files inside, what is lost.
SCRIPT = """
uname -r
cat /sys/module/kvm_amd/parameters/npt /sys/module/kvm/parameters/tdp_mmu
echo to standard error >/dev/stderr
kvmhost run hello || exit 1
kvmhost doctor --all | grep "tracker *guestpt"
touch "$0.made-inside" && test -e "$0.made-inside" || exit 1
sleep 1000 &
exit 7
"""
#: The tests of requests that depend most on processor and kernel; the rest is for patience.
TESTS = [
    *(f"tests/kvm/bindings/test_{name}.py" for name in ("irq", "memory", "run", "vcpu_state")),
    *(f"tests/kvm/test_{name}.py" for name in ("dirty", "dirty_ring", "idle", "pagemap", "pc")),
    "tests/kvm/test_snapshot.py",
]

pytestmark = [pytest.mark.lab, pytest.mark.timeout(10_000)]


def lab_run(name: str, timeout_s: float, *command: str) -> subprocess.CompletedProcess[str]:
    words = ["kvmhost", "lab", "run", "--timeout", str(timeout_s), name, "--", *command]
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)


@pytest.mark.parametrize("name", HOSTS)
def test_a_guest_runs_on_nested_paging(name, lab_host, tmp_path):
    release = name.removeprefix(lab_host(name).architecture + "-")
    script = tmp_path / "script"
    script.write_text(SCRIPT)
    done = lab_run(name, 10 * DEADLINE_S, "bash", str(script))
    print(done.stdout, done.stderr)
    assert done.returncode == 7
    assert done.stderr.endswith("to standard error\n")
    kernel, npt, tdp_mmu, hello, calibration = done.stdout.splitlines()
    assert kernel.startswith(f"{release}.")
    assert {npt, tdp_mmu} <= {"1", "Y"}
    assert hello == "hello from vCPU 0x0 of 0x1"
    # Hardware, here QEMU's, walks the guest's tables: KVM shadows nothing.
    assert "re-arm by none: hardware walks the tables" in calibration
    assert [path.name for path in tmp_path.iterdir()] == ["script"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["amd64-6.1", "amd64-6.12", "amd64-7.3"])
def test_the_kvm_tests_pass_inside(name, lab_host):
    lab_host(name)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--timeout", "0"]
    done = lab_run(name, 9000, sys.executable, *words, *TESTS)
    print(done.stdout[-20_000:], done.stderr)
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["amd64-6.12", "amd64-7.3"])
def test_stress_on_the_tdp_mmu(name, lab_host):
    """KVM's own tables are filled, protected and torn down, and every check holds."""
    lab_host(name)
    for on_fault in ("skip", "stop"):
        words = ["stress", "-m", "16M", "-s", "4M", "-c", "2", "--on-fault", on_fault]
        done = lab_run(name, 30 * DEADLINE_S, "kvmhost", *words, "--engine", "kvm")
        print(done.stdout[-20_000:], done.stderr)
        assert done.returncode == 0
        assert "engine kvm" in done.stdout
        assert "FAILED" not in done.stdout
