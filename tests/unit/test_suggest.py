"""The name that was probably meant."""

from __future__ import annotations

import pytest

from kvmhost.suggest import did_you_mean

KNOWN = ("hello", "hotcold", "touch", "lru_gen")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("helo", "hello"), ("HELLO", "hello"), ("hotcol", "hotcold"), ("lru-gen", "lru_gen"),
     ("hot", "hotcold")],
)  # fmt: skip
def test_close_names_are_suggested(given: str, meant: str) -> None:
    assert did_you_mean(given, KNOWN) == f", did you mean {meant!r}?"


@pytest.mark.parametrize("given", ["frobnicate", "", "h", "zz"])
def test_nothing_is_suggested_where_nothing_is_close(given: str) -> None:
    assert did_you_mean(given, KNOWN) == ""
    assert did_you_mean(given, ()) == ""
