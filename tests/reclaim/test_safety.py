"""Whatever the daemon, its VMs and its clients do to each other: no data and no guest is lost."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import until

from kvmhost.control.client import Client
from kvmhost.control.schema import LeaseRequest
from kvmhost.errors import ControlError
from kvmhost.reclaim.control.client import DaemonClient

pytestmark = [pytest.mark.requires_kvm, pytest.mark.requires_uffd]

MIB = 1 << 20
BUDGET = 24 * MIB
SLACK = 1 * MIB
DEADLINE_S = 60


def evictions(vm):
    return vm.pager().get("evictions", 0)


#: For each line of input a process that takes the lease and evicts until it is killed.
#: It says its number when it has made one round.
EVICTORS = """
import itertools, os, sys
import numpy as np
from kvmhost.control.client import Client
from kvmhost.control.schema import LeaseRequest

def evict(name):
    gfns = np.arange(1024, 1024 + 12288)
    with Client(name) as vm:
        vm.take_lease(LeaseRequest("evictor", ttl_s=60))
        for turn in itertools.count():
            vm.harvest()
            vm.set_limit((16 + turn % 8) << 20)
            vm.evict(np.roll(gfns, 1024 * turn)[:2048], each=True)
            vm.set_victims(gfns[turn % 7 :: 7])
            if not turn:
                print(os.getpid(), flush=True)

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        try:
            evict(sys.argv[1])
        finally:
            print("failed", flush=True)
            os._exit(1)
    os.waitpid(pid, 0)
"""


def killed_again_and_again(vm, times):
    """Kill whoever evicts, in the middle of it, at moments of chance; nobody waits for a lease."""
    chance = random.Random(times)
    nursery = subprocess.Popen(
        [sys.executable, "-c", EVICTORS, vm.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    try:
        for _ in range(times):
            # The one before may hold the lease for as long as its end takes to be noticed.
            until(lambda: vm.client.lease() is None, "the lease of the one before is free")
            nursery.stdin.write("go\n")
            evictor = nursery.stdout.readline().strip()
            assert evictor.isdigit(), "an evictor failed"
            # It works: now a moment that falls anywhere in its next few requests.
            time.sleep(chance.random() * 0.03)
            os.kill(int(evictor), signal.SIGKILL)
    finally:
        nursery.stdin.close()
        nursery.wait(DEADLINE_S)
        nursery.stdout.close()
    assert vm.goes_on(2)
    state = vm.client.state()
    assert (state.running, state.status, state.error) == (True, None, None)
    assert vm.pager()["lost_pages"] == 0
    until(lambda: vm.client.lease() is None, "the last one's lease is free")
    assert vm.client.drain().left_pages == 0
    assert vm.goes_on(2)
    vm.client.stop()
    # Every page that the guest touched held what it had written last.
    assert vm.end() == 0, vm.err


def test_killed_ten_times_in_heavy_eviction(hotcold):
    killed_again_and_again(hotcold("a", "--vcpus", "2", scan_every=8, scan_epochs=4), 10)


@pytest.mark.slow
def test_killed_two_hundred_times_in_heavy_eviction(hotcold):
    killed_again_and_again(hotcold("a", "--vcpus", "2", scan_every=8, scan_epochs=4), 200)


def in_background(vm):
    """Evictions that a daemon asked for, not those of the fault handler."""
    pager = vm.pager()
    return pager.get("evictions", 0) - pager.get("direct_evictions", 0)


def kill_daemons(vm, daemon, times):
    """The daemon itself, killed when it just began to evict, or a little later."""
    chance = random.Random(times)
    for _ in range(times):
        before = in_background(vm)
        mine = daemon("a", "--budget", "16M", "--high", "70%", "--low", "40%")
        until(lambda seen=before: in_background(vm) > seen, "the daemon evicts")
        time.sleep(chance.random() * 0.1)
        mine.signal(signal.SIGKILL)
        assert mine.end(10) == -signal.SIGKILL
    assert vm.goes_on()
    assert vm.pager()["lost_pages"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_daemon_itself_killed_two_hundred_times(hotcold, daemon):
    vm = hotcold("a", "--vcpus", "2", scan_every=8, scan_epochs=4)
    kill_daemons(vm, daemon, 200)
    vm.client.stop()
    assert vm.end() == 0, vm.err


def test_a_daemon_that_hangs_is_noticed_in_the_vms_log(hotcold, daemon):
    vm = hotcold("a")
    mine = daemon("a", "--budget", "24M", "--lease", "300ms", "--name", "sleepy")
    mine.wait_for("a pass 2:")
    assert vm.client.lease().holder == "reclaimd sleepy"
    mine.signal(signal.SIGSTOP)
    until(lambda: vm.client.lease() is None, "the lease is dropped")
    mine.signal(signal.SIGCONT)
    # It wakes up, finds that it has nothing to say any more, and says so.
    assert mine.end() == 1
    assert "nobody has it now" in mine.err
    assert vm.goes_on()
    assert vm.client.state().resident_max_bytes == BUDGET
    assert "reclaimd sleepy" in vm.err
    assert "has not called for" in vm.err


def test_two_daemons_on_one_vm(hotcold, daemon):
    vm = hotcold("a")
    first = daemon("a", "--budget", "24M", "--name", "first")
    first.wait_for("a pass 2:")
    second = daemon("a", "--budget", "20M", "--name", "second")
    assert second.end() == 1
    assert "looked after by reclaimd first" in second.err
    assert "--take-over" in second.err
    assert vm.client.state().resident_max_bytes == BUDGET
    third = daemon("a", "--budget", "20M", "--name", "third", "--take-over")
    third.wait_for("a pass 2:")
    assert first.end() == 1
    assert "it is with reclaimd third" in first.err
    assert vm.client.state().resident_max_bytes == 20 * MIB
    assert "third takes over from reclaimd first" in vm.err
    assert vm.goes_on()


def test_a_daemon_name_is_taken_once(hotcold, daemon):
    hotcold("a")
    daemon("a", "--budget", "24M", "--name", "main").wait_for("a pass 1:")
    second = daemon("a", "--budget", "24M", "--name", "main")
    assert second.end() == 2
    assert "runs already" in second.err


def test_a_client_that_pauses_and_dies(hotcold):
    vm = hotcold("a")
    code = (
        "import sys\nfrom kvmhost.control.client import Client\n"
        "Client(sys.argv[1]).pause(for_s=1)\nprint('paused', flush=True)\n"
        "import time\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "a"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "paused\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert vm.client.state().paused
    assert vm.goes_on()
    assert "nobody ended a pause of 1 s" in vm.err


def test_a_vm_that_stands_still_keeps_its_hot_set(hotcold, daemon):
    """What is hot must not look cold because the guest had no time to touch it."""
    vm = hotcold("a", cold=4, scan_every=0)
    mine = daemon("a", "--name", "still", "--budget", "24M")
    hot = slice(1024 + 12288 // 4, 1024 + 12288 // 4 + 2048)
    until(lambda: mine.out.count("\n") >= 10, "ten passes")
    until(lambda: vm.client.resident()[hot].all(), "the hot set is resident")
    vm.client.pause(for_s=0)
    with DaemonClient("still") as client:

        def skipped():
            found = re.search(
                r"^reclaimd_vm_skipped_passes_total\S* (\S+)$", client.metrics(), re.M
            )
            return float(found[1])

        # The pass that was running may still evict; the ones after it find the VM paused.
        until(skipped, "the VM is found paused")
        passes, evicted = mine.out.count("\n"), evictions(vm)
        until(lambda: skipped() >= 40, "forty intervals: minutes, at a pass a second")
    assert mine.out.count("\n") == passes
    assert evictions(vm) == evicted
    assert vm.client.lease() is not None
    vm.client.resume()
    until(lambda: mine.out.count("\n") >= passes + 4, "passes again")
    assert vm.client.resident()[hot].all()
    assert vm.goes_on()


def test_a_full_store_refuses_and_everything_goes_on(hotcold, daemon):
    vm = hotcold("a", "--store-limit", "512K")
    mine = daemon("a", "--budget", "40M", "--low", "8M", "--high", "9M", "--json")
    until(lambda: vm.pager().get("outcomes", {}).get("full", 0) > 0, "the store is full")
    until(lambda: '"full": ' in mine.out, "the daemon saw it")
    assert vm.goes_on()
    assert vm.pager()["lost_pages"] == 0
    mine.signal(signal.SIGTERM)
    assert mine.end(10) == 0
    vm.client.stop()
    assert vm.end() == 0, vm.err


def test_a_dry_run_leaves_the_vm_alone(hotcold, daemon):
    vm = hotcold("a", cold=4, scan_every=0)
    mine = daemon("a", "--budget", "24M", "--dry-run", "--passes", "8", "--json")
    assert mine.end() == 0
    passes = [json.loads(line)["report"] for line in mine.out.splitlines()]
    assert sum(p["outcomes"].get("done", 0) for p in passes) > 1000
    assert passes[-1]["resident_bytes"] <= BUDGET
    state = vm.client.state()
    assert (state.resident_max_bytes, state.lease) == (0, None)
    assert vm.pager().get("evictions", 0) == 0
    assert state.resident_bytes > BUDGET


def notifications(path):
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(path))
    receiver.settimeout(DEADLINE_S)
    return receiver


def test_the_service_manager_is_told(hotcold, start, tmp_path, monkeypatch):
    hotcold("a")
    config = tmp_path / "reclaimd.toml"
    config.write_text('[daemon]\nvms = ["a"]\ninterval = "50ms"\n[defaults]\nbudget = "24M"\n')
    with notifications(tmp_path / "notify") as receiver:
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "300000")
        mine = start("reclaimd", "--config", str(config))

        def told(text):
            while True:
                lines = receiver.recv(4096).decode().splitlines()
                if text in lines:
                    return lines

        assert "STATUS=managing 1 VM" in told("READY=1")
        told("WATCHDOG=1")
        told("WATCHDOG=1")
        # A file with a mistake: said, and nothing changes; then a good one.
        config.write_text('[daemon]\nvms = ["a"]\ninterval = "fast"\n')
        mine.signal(signal.SIGHUP)
        told("RELOADING=1")
        told("READY=1")
        mine.wait_for(f"{config}:3: daemon.interval: invalid time 'fast'")
        config.write_text('[daemon]\nvms = ["a"]\ninterval = "50ms"\n[defaults]\nbudget = "20M"\n')
        mine.signal(signal.SIGHUP)
        mine.wait_for("configuration reloaded")
        with Client("a") as vm:
            until(lambda: vm.state().resident_max_bytes == 20 * MIB, "the new budget")
        mine.signal(signal.SIGTERM)
        told("STOPPING=1")
    assert mine.end(10) == 0


def test_what_a_client_of_the_lease_sees_of_a_real_vm(hotcold):
    vm = hotcold("a")
    with Client("a") as first, Client("a") as second:
        first.take_lease(LeaseRequest("first"))
        with pytest.raises(ControlError, match="looked after by first"):
            second.take_lease(LeaseRequest("second"))
        assert second.lease().pid == os.getpid()
    assert vm.goes_on()


def test_nothing_is_left_of_killed_daemons(hotcold, daemon, runtime):
    vm = hotcold("a")
    mine = daemon("a", "--budget", "24M")
    mine.wait_for("a pass 1:")
    mine.signal(signal.SIGKILL)
    mine.end(10)
    left = sorted(path.name for path in Path(runtime).glob("_reclaimd.*"))
    assert left == [f"_reclaimd.pid-{mine.pid}.lock", f"_reclaimd.pid-{mine.pid}.sock"]
    heir = daemon("a", "--budget", "24M", "--passes", "1")
    assert heir.end() == 0
    assert list(Path(runtime).glob("_reclaimd.*")) == []
    assert vm.goes_on()
