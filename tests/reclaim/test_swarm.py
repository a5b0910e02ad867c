"""A hundred VMs that come and go, and clients that flood: real sockets, real protocol."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading

import pytest
from waiting import DEADLINE_S, until

from kvmhost.control.paths import running_names
from kvmhost.reclaim.control.client import DaemonClient

#: VMs without a guest behind real control servers: names in, one a line; "-NAME" ends one.
FAKES = """
import sys, types
import numpy as np
from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.control.server import ControlServer
from kvmhost.machine import BaseMachine
from kvmhost.memory.guest import GuestMemory, Region
from kvmhost.memory.layout import TinyLayout
from kvmhost.pager.results import EvictResult, ShrinkResult
from kvmhost.vm import Harvest
from kvmhost.vm.answers import RearmCost

N = 1024

class Pager:
    def __init__(self, here): self.here = here
    def evict(self, pages, event=None):
        gfns = pages.gfns
        self.here[gfns] = False
        return EvictResult(gfns, np.zeros(gfns.size, np.uint8))
    resident_max_bytes = 0
    def set_limit(self, n_bytes): self.resident_max_bytes = n_bytes
    def set_victims(self, gfns): pass
    def shrink(self): return ShrinkResult(0, 0)
    def counters(self): return {"latency_ns": [], "latency_sum_ns": 0}

class Memory(GuestMemory):
    def resident(self): return self.here.copy()

class FakeMachine(BaseMachine):
    has_pager, running, paused, still, status, error = True, True, False, False, None, None
    serial = types.SimpleNamespace(n_bytes=0, lost_bytes=0)
    uptime_s, exits, doorbells, tracker_name = 1.0, 0, 0, "fake"
    runner = types.SimpleNamespace(cpu_seconds=lambda: 0.5)
    engine = types.SimpleNamespace(name="fake")
    image = types.SimpleNamespace(path="fake")
    def __init__(self, name):
        self.name, self.params, self._closed = name, {}, False
        self._harvester = None
        self.layout = TinyLayout(N << 12)
        self.memory = Memory([Region(0, N << 12)])
        self.here = self.memory.here = np.ones(N, bool)
        self._pager = Pager(self.here)
        self.vcpus = [types.SimpleNamespace(index=0, exits=0, doorbells=0, epoch=0)]
    def assemble(self): return []
    def run_harvest(self, asked, owner=None):
        young = YoungBitmap.from_gfns(0, N, range(100), provenance=Provenance("fake", "npt", 1, 2))
        return Harvest(young, 5, 5)
    def rearm_cost(self): return RearmCost("fake", 1000.0, False, 256, 7, 0.0)
    def open_pager(self): return self._pager
    def close(self): self.memory.close()

held = {}
for line in sys.stdin:
    name = line.strip()
    if name.startswith("-"):
        server, machine = held.pop(name[1:])
        server.close(); machine.close()
    else:
        machine = FakeMachine(name)
        held[name] = (ControlServer(machine).start(), machine)
    print(name, flush=True)
"""


class Fakes:
    """A process of light VMs."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", FAKES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def say(self, *words):
        for word in words:
            self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        for word in words:
            assert self.process.stdout.readline().strip() == word

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def fakes(runtime):
    """Make processes of VMs; asked for after ``start``, so that they end before it looks."""
    made = []

    def make():
        made.append(Fakes())
        return made[-1]

    yield make
    for one in made:
        one.kill()
    # What was killed left its sockets and locks, as any killed VM does.
    if runtime.exists():
        for path in runtime.glob("vm*"):
            path.unlink()


def looked_after(client):
    return {vm.vm: vm for vm in client.status().vms}


def test_a_hundred_vms_come_and_go(start, fakes):
    names = [f"vm{i:03}" for i in range(100)]
    mine = start(
        "reclaimd", "vm*", "--name", "swarm", "--budget", "2M", "--interval", "0.3", "--json"
    )
    first, second = fakes(), fakes()
    first.say(*names[:50])
    second.say(*names[50:])
    assert len(running_names()) == 100
    with DaemonClient("swarm") as client:
        until(lambda: mine.out.count('"event": "pass"') > 0, "it runs")
        until(lambda: sorted(looked_after(client)) == names, "all are looked after")
        until(lambda: min(vm.passes for vm in looked_after(client).values()) >= 3, "three passes")
        assert all(vm.evicted_pages > 0 for vm in looked_after(client).values())
        assert client.metrics().count("reclaimd_vm_passes_total{") == 100
        # Half of them leave one by one, the other half all at once and without a word.
        first.say(*(f"-{name}" for name in names[:50]))
        until(lambda: sorted(looked_after(client)) == names[50:], "fifty are gone")
        second.kill()
        until(lambda: not looked_after(client), "all are gone")
        assert "vm0" not in client.metrics().replace('kind="', "")
        third = fakes()
        third.say("vm007", "vm042")
        until(lambda: sorted(looked_after(client)) == ["vm007", "vm042"], "two are back")
        third.say("-vm007", "-vm042")
    assert mine.running()
    dropped = [json.loads(line) for line in mine.out.splitlines() if '"dropped"' in line]
    assert not any(event["failed"] for event in dropped)


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_real_vms_among_light_ones(start, fakes, hotcold):
    light = fakes()
    light.say(*(f"vm{i}" for i in range(20)))
    vms = [hotcold(name, epochs=0) for name in ("vmreal1", "vmreal2")]
    mine = start("reclaimd", "vm*", "--name", "mix", "--total-budget", "80M", "--interval", "0.2")
    with DaemonClient("mix") as client:
        mine.wait_for("vmreal2 pass 4:")
        until(lambda: len(looked_after(client)) == 22, "all are looked after")

        def shared_out():
            # Each follows at its next pass; until then it has what it had with fewer VMs.
            parts = [v.budget_bytes for v in looked_after(client).values()]
            return all(parts) and sum(parts) <= 80 << 20

        until(shared_out, "a part for each, and all parts within the budget")
    for vm in vms:
        assert vm.goes_on(2)
        assert vm.pager()["lost_pages"] == 0
    light.say(*(f"-vm{i}" for i in range(20)))
    for vm in vms:
        vm.client.stop()
        assert vm.end() == 0, vm.err


FLOOD = """
import contextlib, socket, sys, threading
def flood():
    burst = b"GET /v1/decisions?n=1000 HTTP/1.1\\r\\nHost: d\\r\\n\\r\\n" * 200
    while True:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as peer:
            peer.connect(sys.argv[1])
            while True:
                peer.sendall(burst)
threads = [threading.Thread(target=flood, daemon=True) for _ in range(40)]
for thread in threads: thread.start()
print("flooding", flush=True)
threads[0].join()
"""


def test_a_client_that_floods_the_daemon(start, fakes):
    light = fakes()
    light.say("vm1")
    mine = start("reclaimd", "vm1", "--name", "flooded", "--budget", "2M", "--interval", "0.1")
    mine.wait_for("vm1 pass 2:")
    with DaemonClient("flooded") as client:
        flood = subprocess.Popen(
            [sys.executable, "-c", FLOOD, str(client.path)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert flood.stdout.readline() == "flooding\n"
            passes = looked_after(client)["vm1"].passes
            for _ in range(10):
                assert client.status().name == "flooded"
                assert "reclaimd_vms 1.0" in client.metrics()
            until(lambda: looked_after(client)["vm1"].passes >= passes + 3, "passes go on")
        finally:
            flood.kill()
            flood.wait()
            flood.stdout.close()
        assert client.decisions(5)
    light.say("-vm1")
    assert mine.end() == 0


def test_the_daemons_socket_refuses_nonsense_and_answers_on(start, fakes):
    light = fakes()
    light.say("vm1")
    mine = start("reclaimd", "vm1", "--name", "asked", "--budget", "2M", "--interval", "0.1")
    mine.wait_for("vm1 pass 2:")

    def ask(raw):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(DEADLINE_S)
            peer.connect(str(client.path))
            peer.sendall(raw)
            data = b""
            with contextlib.suppress(ConnectionResetError):
                while chunk := peer.recv(65536):
                    data += chunk
            return int(data.split()[1])

    with DaemonClient("asked") as client:
        for path, status in [
            ("/", 404),
            ("/v1/page", 400),
            ("/v1/page?vm=vm1&gfn=zz", 400),
            ("/v1/page?vm=vm1&gfn=99999999", 400),
            ("/v1/page?vm=none&gfn=1", 404),
            ("/v1/decisions?n=0", 400),
            ("/v1/decisions?what=1", 400),
            ("/v1/status?x=1", 400),
            ("/metrics?x=1", 400),
            ("/v1/status", 200),
            ("/metrics", 200),
        ]:
            raw = f"GET {path} HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n"
            assert ask(raw.encode()) == status, path
        assert ask(b"POST /metrics HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n") == 405
        problems = []

        def visit():
            try:
                for _ in range(5):
                    assert client.page("vm1", 200).story.evictions >= 1
            except BaseException as error:  # noqa: BLE001 - reported by the test below
                problems.append(error)

        until(lambda: client.page("vm1", 200).story.evictions >= 1, "an eviction")
        threads = [threading.Thread(target=visit) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert problems == []
        assert 'vms = [\n    "vm1",\n]' in client.config()
    light.say("-vm1")
    assert mine.end() == 0
