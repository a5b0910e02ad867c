"""``kvmhost limit``, as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmhost.control.paths import RUNTIME_DIR_ENV
from kvmhost.control.server import ControlServer
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.tools.main import main

pytestmark = pytest.mark.requires_uffd


def test_limit_shrinks_a_running_vm_and_says_if_it_cannot(
    make_vm: Callable[..., Machine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(RUNTIME_DIR_ENV, str(tmp_path / "run"))
    params = {"pages": 1000, "hot": 100, "epochs": 0}
    vm = make_vm(
        image_path("hotcold"), mem_bytes=16 << 20, engine="emulated", params=params, name="a"
    )
    server = ControlServer(vm).start()
    try:
        vm.step_by_doorbell()
        vm.run_epoch()
        assert main(["limit", "a", "2M"]) == 0
        assert capsys.readouterr().out.endswith("pages evicted, limit 2097152 bytes\n")
        assert vm.open_pager().counters()["resident_pages"] <= 512
        assert main(["limit", "a", "4K", "--json"]) == 1
        shown = capsys.readouterr()
        over = vm.open_pager().counters()["resident_pages"] - 1
        assert json.loads(shown.out)["over_pages"] == over > 0
        assert f"{over} pages are resident above the limit" in shown.err
        assert main(["limit", "a", "0"]) == 0
    finally:
        server.close()
