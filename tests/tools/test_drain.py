"""``kvmhost drain`` and the store's options of ``kvmhost run``, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvmhost.control.client import Client
from kvmhost.control.paths import RUNTIME_DIR_ENV
from kvmhost.control.schema import LeaseRequest
from kvmhost.control.server import ControlServer
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.pager.options import StoreOptions
from kvmhost.tools.main import main

pytestmark = pytest.mark.requires_uffd

PAGES = 1000


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUNTIME_DIR_ENV, str(tmp_path / "run"))


@pytest.fixture
def vm(make_vm: Callable[..., Machine]) -> Machine:
    params = {"pages": PAGES, "hot": 100, "epochs": 0}
    return make_vm(
        image_path("hotcold"), mem_bytes=16 << 20, engine="emulated", params=params, name="a"
    )


def test_drain_of_a_running_vm(vm: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    server = ControlServer(vm).start()
    try:
        vm.step_by_doorbell()
        vm.run_epoch()
        vm.open_pager().evict(np.arange(1024, 1024 + PAGES))
        evicted = vm.open_pager().counters()["evicted_pages"]
        assert evicted > 500
        assert main(["drain", "a", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report == {"restored_pages": evicted, "lost_pages": 0, "left_pages": 0}
        assert vm.open_pager().counters()["evicted_pages"] == 0
        assert main(["drain", "a"]) == 0
        assert capsys.readouterr().out == "0 pages came back\n"
    finally:
        server.close()


def test_drain_beside_a_daemon_says_so_and_needs_force(
    vm: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ControlServer(vm).start()
    try:
        vm.step_by_doorbell()
        vm.run_epoch()
        vm.open_pager().evict(np.arange(1024, 1024 + PAGES))
        evicted = vm.open_pager().counters()["evicted_pages"]
        with Client(server.path) as daemon:
            daemon.take_lease(LeaseRequest("reclaimd"))
            assert main(["drain", "a"]) == 2
            assert "managed by reclaimd (process" in capsys.readouterr().err
            assert vm.open_pager().counters()["evicted_pages"] == evicted
            assert main(["drain", "a", "--force"]) == 0
        shown = capsys.readouterr()
        assert shown.out == f"{evicted} pages came back\n"
        assert "may evict again" in shown.err
    finally:
        server.close()


def test_drain_that_loses_pages_says_so(vm: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    server = ControlServer(vm).start()
    try:
        vm.step_by_doorbell()
        vm.run_epoch()
        vm.open_pager().evict(np.arange(1024, 1024 + PAGES))
        vm.open_pager().inject_failures(loads=2)
        assert main(["drain", "a"]) == 1
        assert "2 pages are lost" in capsys.readouterr().err
    finally:
        server.close()


def test_drain_without_a_vm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drain", "nobody"]) == 1
    assert "nothing answers" in capsys.readouterr().err


HOTCOLD = ["run", "hotcold", "--mem", "32M", "--resident-max", "8M", "--param", "pages=4000"]
SHORT = ["--param", "epochs=6", "--param", "scan_every=2", "--timeout", "50"]


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_run_with_a_store_in_a_file(
    tmp_path: Path, codec: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "store"
    more = ["--store", str(path), "--codec", codec, "--prefetch", "4", "--json"]
    assert main([*HOTCOLD, *SHORT, *more]) == 0
    pager = json.loads(capfd.readouterr().out)["pager"]
    assert pager["fault_ins"] > 100
    assert pager["prefetched_pages"] > 0
    assert pager["lost_pages"] == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--store", "/nowhere/at/all"], "No such file"),
        (["--prefetch", "65"], "0 to 64"),
        (["--prefetch", "-1"], "--prefetch"),
    ],
)
def test_run_with_bad_store_options(
    options: list[str], word: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "hello", *options]) == 2
    captured = capfd.readouterr()
    assert word in captured.err
    assert captured.out == ""


def test_lost_page_ends_the_run_with_125(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every record of the file is spoilt as it is written: the first fault-in finds out."""
    original = Machine.start

    def start(self: Machine, paused: bool = False) -> None:
        self.open_pager().inject_failures(loads=1)
        original(self, paused)

    monkeypatch.setattr(Machine, "start", start)
    more = ["--store", str(tmp_path / "store")]
    assert main([*HOTCOLD, *SHORT, *more]) == 125
    assert "machine check: the store cannot give back gfn 0x" in capfd.readouterr().err


def test_options_reach_the_pager() -> None:
    options = StoreOptions(codec="zstd", limit_bytes=1 << 20, prefetch_pages=3)
    with Machine(
        image_path("hello"), mem_bytes=4 << 20, engine="emulated", store=options
    ) as machine:
        assert machine.open_pager().codec.name == "zstd"
        assert machine.open_pager().options == options
