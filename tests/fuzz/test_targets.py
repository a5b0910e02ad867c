"""Every fuzz target, for a bounded number of examples: ``FUZZ_EXAMPLES=100000`` for more.

Inputs are seeds with fields overwritten by values that break arithmetic, pieces taken out,
doubled or put in, and cuts; and bytes of no kind.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import SEEDS, TARGETS

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
_NUMBERS = st.sampled_from([0, 1, 0x7F, 0xFF, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1])
_WORDS = st.sampled_from(
    [b"-1", b"9" * 30, b"1e999", b"\xff", b"\0", b"[" * 200, b'"', b"=", b"\n"]
)
_EDITS = st.tuples(
    st.sampled_from(["set", "cut", "double", "insert", "end"]),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([1, 2, 4, 8]),
    _NUMBERS | st.integers(0, (1 << 64) - 1),
    _WORDS,
)


def edited(seed: bytes, edits: list[tuple[str, float, int, int, bytes]]) -> bytes:
    data = bytearray(seed)
    for what, where, size, number, word in edits:
        at = int(where * len(data))
        if what == "set":
            data[at : at + size] = (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif what == "cut":
            del data[at : at + size]
        elif what == "double":
            data[at:at] = data[at : at + 8 * size]
        elif what == "insert":
            data[at:at] = word
        else:
            del data[at:]
    return bytes(data)


def inputs(name: str) -> st.SearchStrategy[bytes]:
    noise = st.binary(max_size=200)
    if name not in SEEDS:
        return noise
    edits = st.lists(_EDITS, max_size=5)
    return st.builds(edited, st.sampled_from(SEEDS[name]), edits) | noise


@pytest.mark.parametrize("name", TARGETS)
def test_target(name: str) -> None:
    @settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(inputs(name))
    def run(data: bytes) -> None:
        TARGETS[name](data)

    run()


@pytest.mark.parametrize("name", SEEDS)
def test_seeds_pass(name: str) -> None:
    for seed in SEEDS[name]:
        TARGETS[name](seed)
