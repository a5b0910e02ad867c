"""Every pair of the things that may happen to a VM, at once, on a guest that checks its bytes.

The actors are in ``tests/helpers/actors.py``, what is checked in ``tests/helpers/pairs.py``.
``make test-slow`` runs the pairs for an hour in all; ``KVMHOST_PAIRS_SECONDS`` is another length.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from actors import ACTORS, Actor
from pairs import World, run_together

pytestmark = [pytest.mark.requires_uffd, pytest.mark.usefixtures("nothing_left")]

#: Epochs that the guest finishes in a short run.
EPOCHS = {"kvm": 12, "emulated": 3}


def pairs(engine: str) -> list[tuple[str, str]]:
    """Return every pair of actors that work on an engine; most meet one of their own too."""
    names = [name for name, actor in ACTORS.items() if engine in actor.engines]
    return [
        pair
        for pair in itertools.combinations_with_replacement(names, 2)
        if pair[0] != pair[1] or ACTORS[pair[0]].twice
    ]


CASES = [
    pytest.param(
        engine,
        pair,
        id=f"{engine}-{'+'.join(pair)}",
        marks=[pytest.mark.requires_kvm] if engine == "kvm" else [],
    )
    for engine in EPOCHS
    for pair in pairs(engine)
]
SLOW_SECONDS = float(os.environ.get("KVMHOST_PAIRS_SECONDS", "3600")) / len(CASES)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., list[Actor]]]:
    """Return what runs actors by name, and frees them and the VM afterwards."""
    made: list[Actor] = []
    worlds: list[World] = []

    def run(engine: str, names: Sequence[str], seconds: float = 0.0, seed: int = 1) -> list[Actor]:
        made.extend(ACTORS[name](seed + number) for number, name in enumerate(names))
        worlds.append(World(engine, tmp_path, made))
        run_together(worlds[0], made, epochs=EPOCHS[engine], seconds=seconds)
        return made

    yield run
    for world in worlds:
        world.close()
    for actor in made:
        actor.close()


@pytest.mark.parametrize(("engine", "pair"), CASES)
def test_pair(engine: str, pair: tuple[str, str], run: Callable[..., list[Actor]]) -> None:
    run(engine, pair)


@pytest.mark.requires_kvm
def test_all_at_once(run: Callable[..., list[Actor]]) -> None:
    run("kvm", list(ACTORS))


@pytest.mark.slow
@pytest.mark.timeout(SLOW_SECONDS + 600)
@pytest.mark.parametrize(("engine", "pair"), CASES)
def test_pair_for_long(engine: str, pair: tuple[str, str], run: Callable[..., list[Actor]]) -> None:
    run(engine, pair, SLOW_SECONDS, seed=int.from_bytes(os.urandom(4), "little"))
