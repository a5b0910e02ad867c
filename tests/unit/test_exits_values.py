"""Exits are values: equal by content, hashable, unchangeable, picklable, matchable."""

from __future__ import annotations

import inspect
import pickle

import pytest

from kvmhost import exits
from kvmhost.exits import Exit, Hlt, IoOut, MsrRead, Shutdown

KINDS = [
    kind
    for _, kind in inspect.getmembers(exits, inspect.isclass)
    if issubclass(kind, Exit) and kind is not Exit
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_value(kind: type[Exit]) -> None:
    names = kind.__match_args__
    made = kind(*range(len(names)))
    assert made == kind(**dict(zip(names, range(len(names)), strict=True)))
    assert hash(made) == hash(pickle.loads(pickle.dumps(made)))
    assert pickle.loads(pickle.dumps(made)) == made
    assert repr(made).startswith(f"{kind.__name__}(")
    with pytest.raises(AttributeError, match="does not change"):
        setattr(made, names[0] if names else "anything", 1)
    with pytest.raises(TypeError, match=f"{kind.__name__} takes"):
        kind(*range(len(names) + 1))


def test_kinds_differ_and_defaults_hold() -> None:
    assert Hlt() != Shutdown()
    assert Shutdown() == Shutdown("")
    assert IoOut(1, 2, b"ab") == IoOut(1, 2, data=b"ab", count=1)
    assert repr(MsrRead(16, 4)) == "MsrRead(index=16, reason=4)"
    for wrong in (lambda: IoOut(1), lambda: IoOut(1, 2, b"", prot=5), lambda: Hlt(port=1)):  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="takes"):
            wrong()
    with pytest.raises(TypeError, match="takes"):
        IoOut(1, 2, b"", port=3)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del MsrRead(1, 2).index


def test_kinds_match_by_position() -> None:
    match IoOut(0x3F8, 1, b"x"):
        case IoOut(port, 1, data):
            assert (port, data) == (0x3F8, b"x")
        case _:
            pytest.fail("no match")
