"""The cache of the lab: complete or not there."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from kvmhost.errors import HostError
from kvmhost.lab import cache
from kvmhost.lab.hosts import HOSTS
from kvmhost.lab.pins import Pin, pinned


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kvmhost" / "lab"


def pin_of(raw: bytes) -> Pin:
    return Pin("suite", "name", "1", hashlib.sha256(raw).hexdigest())


def test_a_relative_cache_folder_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/nowhere")
    assert cache.cache_folder() == Path("/nowhere/.cache/kvmhost/lab")


def test_a_package_is_kept_and_a_damaged_one_is_missing(tmp_path: Path) -> None:
    archive, pin = tmp_path / "x.deb", pin_of(b"archive")
    archive.write_bytes(b"archive")
    assert cache.find_package(pin) is None
    kept = cache.keep_package(pin, archive)
    assert cache.find_package(pin) == kept
    kept.write_bytes(b"archiv")
    assert cache.find_package(pin) is None
    assert cache.keep_package(pin, archive).read_bytes() == b"archive"


def test_a_package_with_another_checksum_is_refused(tmp_path: Path, folder: Path) -> None:
    archive = tmp_path / "x.deb"
    archive.write_bytes(b"other")
    with pytest.raises(HostError, match="SHA-256"):
        cache.keep_package(pin_of(b"archive"), archive)
    assert not (folder / "packages").exists()


def test_an_entry_that_fails_does_not_appear(folder: Path) -> None:
    entry = folder / "hosts" / "a"

    def fill_half() -> None:
        with cache.filled_entry(entry) as partial:
            (partial / "kernel").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill_half()
    assert list((folder / "hosts").iterdir()) == []


@pytest.mark.parametrize("change", ["cut", "remove", "sums"])
def test_a_damaged_entry_is_found_and_replaced(folder: Path, change: str) -> None:
    entry = folder / "hosts" / "a"

    def fill() -> None:
        with cache.filled_entry(entry) as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / "kernel").write_bytes(b"whole")

    fill()
    assert cache.check_entry(entry) is None
    kernel = entry / "sub" / "kernel"
    if change == "cut":
        kernel.write_bytes(b"who")
    elif change == "remove":
        kernel.unlink()
    else:
        (entry / "sums.json").write_text("[]")
    problem = cache.check_entry(entry)
    assert problem is not None
    assert str(entry) in problem
    fill()
    assert cache.check_entry(entry) is None


def test_an_entry_that_another_process_made_meanwhile_stays(folder: Path) -> None:
    entry = folder / "hosts" / "a"
    with cache.filled_entry(entry) as slower:
        (slower / "kernel").write_bytes(b"slower")
        with cache.filled_entry(entry) as faster:
            (faster / "kernel").write_bytes(b"faster")
    assert (entry / "kernel").read_bytes() == b"faster"
    assert [p.name for p in entry.parent.iterdir()] == ["a"]


def test_newer_packages_are_used_until_the_choice_is_dropped() -> None:
    kernel = next(iter(HOSTS.values())).kernel
    pins = pinned(kernel)
    assert cache.chosen_pins(kernel) == pins
    newer = dataclasses.replace(
        pins, packages=(dataclasses.replace(pins.packages[0], version="9"),)
    )
    cache.keep_choice(kernel, newer)
    assert cache.chosen_pins(kernel) == newer
    assert cache.entry_folder(newer, "r") == cache.entry_folder(newer, "r")
    assert cache.entry_folder(newer, "r") != cache.entry_folder(newer, "s")
    cache.keep_choice(kernel, None)
    assert cache.chosen_pins(kernel) == pins


def test_every_host_has_pins_of_its_architecture() -> None:
    for host in HOSTS.values():
        pins = pinned(host.kernel)
        assert pins.architecture == host.architecture
        for pin in pins.packages:
            assert len(bytes.fromhex(pin.sha256)) == 32
            assert pin.version
