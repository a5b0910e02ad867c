"""``kvmhost page``, ``lru_gen`` and ``reclaimd`` as a user types them, on a real VM."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from waiting import DEADLINE_S, until

from kvmhost.control.client import Client
from kvmhost.control.paths import RUNTIME_DIR_ENV
from kvmhost.errors import VmGoneError

pytestmark = [pytest.mark.requires_kvm, pytest.mark.requires_uffd]


def kvmhost(*words, code=0):
    run = subprocess.run(
        [sys.executable, "-m", "kvmhost", *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert run.returncode == code, run.stdout + run.stderr
    return run


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A VM and a daemon that keeps it small, with metrics on a port."""
    directory = tmp_path_factory.mktemp("pair")
    environ = os.environ | {RUNTIME_DIR_ENV: str(directory / "run")}
    port = free_port()
    words = ["--mem", "64M", "--param", "pages=12288", "--param", "hot=1024", "--param", "epochs=0"]
    commands = [
        ["run", "hotcold", "--name", "vm1", *words],
        [
            *["reclaimd", "vm1", "--wait", "--budget", "24M", "--interval", "0.1"],
            *["--name", "main", "--metrics-port", str(port)],
            *["--decisions-file", str(directory / "decisions.jsonl")],
        ],
    ]
    processes = []
    with (directory / "log").open("wb") as log:
        for command in commands:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "kvmhost", *command],
                    env=environ,
                    stdout=log,
                    stderr=log,
                )
            )
    text = (directory / "log").read_text
    try:
        until(lambda: "vm1 pass 8:" in text(), f"passes: {text()}")
        yield directory, port
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
            process.wait(DEADLINE_S)


@pytest.fixture(autouse=True)
def runtime(pair, monkeypatch):
    monkeypatch.setenv(RUNTIME_DIR_ENV, str(pair[0] / "run"))


def test_a_page_is_explained(pair):
    gone = 1024 + 5
    with Client("vm1") as vm:
        until(lambda: vm.page(gone).state == "evicted", "a page that went")
    out = kvmhost("page", "vm1", hex(gone)).stdout
    for label in ("gfn", "slot", "hva", "state", "lru_gen", "windows", "evictions", "last action"):
        assert re.search(rf"^{label}\b", out, re.MULTILINE), out
    assert re.search(r"windows +[1.]+ \(newest first", out)
    assert re.search(r"^now +\S+", out, re.MULTILINE)
    assert "(budget)" in out or "(limit)" in out
    whole = json.loads(kvmhost("page", "vm1", str(gone), "--json").stdout)
    assert whole["page"]["gfn"] == whole["daemon"]["gfn"] == gone
    assert whole["daemon"]["story"]["evictions"] >= 1
    assert whole["problem"] == ""


def test_a_pinned_page_and_pages_that_are_none(pair):
    with Client("vm1") as vm:
        pinned = vm.memory_map().pinned[0].gfn_start
    assert "pinned" in kvmhost("page", "vm1", str(pinned)).stdout
    assert "gfn" in kvmhost("page", "vm1", "0x99999999", code=2).stderr
    assert "GFN" in kvmhost("page", "vm1", "x", code=2).stderr
    kvmhost("page", "nobody", "5", code=1)


def test_without_a_daemon_it_says_what_the_vm_knows(pair):
    run = kvmhost("page", "vm1", "0x500", "--daemon", "nobody")
    assert "state" in run.stdout
    assert "windows" not in run.stdout
    assert "no history" in run.stderr


def test_lru_gen_shows_ages_and_evicts(pair):
    shown = kvmhost("lru_gen", "show").stdout
    assert re.match(r"memcg +1 vm1\n node +0\n +\d+ +\d+ +\d+ +\d+\n", shown)
    assert kvmhost("lru_gen", "show", "vm1").stdout.startswith("memcg")
    seqs = [int(line.split()[0]) for line in shown.splitlines()[2:]]
    assert len(seqs) >= 4

    def evict():
        text = kvmhost("lru_gen", "show", "vm1").stdout
        oldest = int(text.splitlines()[2].split()[0])
        run = kvmhost("lru_gen", "run", f"- vm1 0 {oldest + 1} 200 16")
        return re.fullmatch(r"\d+ pages evicted\n", run.stdout)

    assert evict()
    assert "youngest" in kvmhost("lru_gen", "run", "- vm1 0 99999999", code=2).stderr
    assert "need +" in kvmhost("lru_gen", "run", "* vm1 0 1", "--daemon", "main", code=2).stderr
    kvmhost("lru_gen", "run", "- other 0 1", code=1)
    kvmhost("lru_gen", "run", "- other 0 1", "--daemon", "main", code=2)
    kvmhost("lru_gen", code=2)


def test_capabilities_at_run_time(pair):
    assert kvmhost("lru_gen", "enabled", "vm1").stdout == "0x000b\n"
    assert kvmhost("lru_gen", "enabled", "vm1", "n").stdout == "0x0000\n"
    assert kvmhost("lru_gen", "enabled", "1", "--daemon", "main").stdout == "0x0000\n"
    assert json.loads(kvmhost("lru_gen", "enabled", "vm1", "0xb", "--json").stdout) == {"caps": 11}
    refused = kvmhost("lru_gen", "enabled", "vm1", "3", code=2).stderr
    assert "0x8 (spte walk) cannot be off" in refused
    assert kvmhost("lru_gen", "enabled", "vm1").stdout == "0x000b\n"


def test_full_statistics(pair):
    def swept():
        last = kvmhost("lru_gen", "show", "vm1", "--full").stdout.splitlines()[-1]
        return re.fullmatch(r" +(\d+)L +(\d+)O +(\d+)Y +(\d+)N +(\d+)F +(\d+)A", last)

    found = swept()
    assert found, kvmhost("lru_gen", "show", "vm1", "--full").stdout
    total, old, young, tables, passed, _ = map(int, found.groups())
    assert total == old + young > 0
    assert tables == passed == -(-total // 512)
    assert "text only" in kvmhost("lru_gen", "show", "--full", "--json", code=2).stderr


def test_aging_by_command(pair):
    def youngest():
        return int(kvmhost("lru_gen", "show", "vm1").stdout.splitlines()[-1].split()[0])

    # A pass may open one in between: then the command names an older one, which is passed over.
    before = youngest()
    kvmhost("lru_gen", "run", f"+ vm1 0 {before}")
    assert youngest() > before


def test_metrics_on_the_loopback_and_decisions_in_the_file(pair):
    directory, port = pair
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=DEADLINE_S) as answer:
        text = answer.read().decode()
    assert re.search(r'reclaimd_vm_evicted_pages_total\{vm="vm1",why="budget"\} [1-9]', text)
    assert re.search(r'reclaimd_vm_fault_in_seconds_count\{vm="vm1"\} [1-9]', text)
    lines = [json.loads(line) for line in (directory / "decisions.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(1, len(lines) + 1))
    kinds = {line["kind"] for line in lines}
    assert {"attach", "budget", "evict"} <= kinds
    assert all(line["why"] for line in lines if line["kind"] == "evict")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vm1"], "nothing to do"),
        (["--budget", "1M"], "name a VM"),
        (["vm1", "--budget", "1M", "--psi-trigger", "often"], "is no trigger"),
        (["vm1", "--budget", "1M", "--set", "vm.x.nonsense=1"], "vm.PATTERN.KEY=VALUE"),
        (["vm1", "--budget", "1M", "--set", "vm.x.budget=1s"], "invalid size"),
        (["vm1", "--budget", "1M", "--config", "/none/x.toml"], "/none/x.toml: No such file"),
        (["vm1", "--budget", "1M", "--decisions-file", "/none/x"], "/none/x: No such file"),
        (["vm1", "--budget", "1M", "--name", "../x"], "name"),
    ],
)
def test_wrong_words(words, said):
    assert said in kvmhost("reclaimd", *words, code=2).stderr


def test_what_is_missing_is_a_missing_capability():
    run = kvmhost("reclaimd", "vm1", "--cgroup", "/none", code=126)
    assert "memory cgroup" in run.stderr
    run = kvmhost("reclaimd", "vm1", "--psi", "/none", "--psi-target", "1%", code=126)
    assert "/none" in run.stderr


def test_the_options_in_force_read_back(tmp_path):
    words = ["a", "--budget", "64M", "--set", "vm.web*.weight=2", "--psi-target", "0.1%"]
    text = kvmhost("reclaimd", *words, "--print-config").stdout
    file = tmp_path / "x.toml"
    file.write_text(text)
    assert kvmhost("reclaimd", "--config", str(file), "--print-config").stdout == text
    assert "weight = 2.0" in text


def test_nobody_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv(RUNTIME_DIR_ENV, str(tmp_path / "empty"))
    assert "no daemon runs" in kvmhost("lru_gen", "show", code=2).stderr
    with pytest.raises(VmGoneError, match="nothing answers"), Client("vm1") as client:
        client.state()
