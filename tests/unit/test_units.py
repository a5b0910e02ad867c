"""Amounts with units: one grammar, wherever they are written."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvmhost.control.schema import HarvestQuery, SchemaError, decode_query
from kvmhost.reclaim.settings.config import load, options, read_flag
from kvmhost.tools import args
from kvmhost.units import MAX_BYTES, MAX_SECONDS, PAGE_BYTES, Bytes, Mark, Seconds, Share

KINDS = (Bytes, Seconds, Share, Mark)
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "GiB": 1 << 30, "mb": 1 << 20, "T": 1 << 40}


def _flag(key: str) -> Callable[[str], object]:
    option = next(option for option in options() if option.key == key)
    return lambda text: read_flag(option, text)


def _file(section: str, key: str, text: str, path: Path) -> object:
    budget = "" if key == "budget" else '[defaults]\nbudget = "64M"\n'
    path.write_text(f'{budget}[{section}]\n{key} = "{text}"\n')
    return getattr(getattr(load(path), section), key)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("65536", 65536),
        ("64M", 64 << 20),
        ("64m", 64 << 20),
        ("64 MiB", 64 << 20),
        ("1.5GiB", 3 << 29),
        ("0.25K", 256),
        ("4096B", 4096),
        ("1page", PAGE_BYTES),
        ("8192pages", 32 << 20),
        ("0.5 pages", PAGE_BYTES // 2),
        ("4096T", MAX_BYTES),
    ],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert Bytes.parse(text) == Mark.parse(text).size == args.size_bytes(text) == n_bytes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("500us", 0.0005),
        ("500ms", 0.5),
        ("1s", 1),
        (".5s", 0.5),
        ("0.5", 0.5),
        ("2m", 120),
        ("2min", 120),
        ("1.5 h", 5400),
    ],
)
def test_times(text: str, value: float) -> None:
    assert Seconds.parse(text) == args.seconds(text) == value


@pytest.mark.parametrize("text", ["12.5%", "1/8", "0.125", ".125", "12.5 %", "2/16"])
def test_shares_have_three_spellings(text: str) -> None:
    assert Share.parse(text) == Mark.parse(text).share == args.share(text) == 0.125


@pytest.mark.parametrize(
    ("kind", "given", "problem"),
    [
        (Bytes, "12Q", "write 256M, 1.5GiB, 8192pages or 65536"),
        (Bytes, "1.5", "invalid size '1.5'"),
        (Bytes, "0.3K", "not a whole number of bytes"),
        (Bytes, "1.5B", "invalid size '1.5B'"),
        (Bytes, "-1M", "invalid size '-1M'"),
        (Bytes, "4097T", "at most 4096T"),
        (Bytes, 1.5, "invalid size 1.5"),
        (Bytes, True, "invalid size True"),
        (Bytes, "1\N{KELVIN SIGN}", "invalid size"),
        (Bytes, "\N{ARABIC-INDIC DIGIT ONE}M", "invalid size"),
        (Seconds, "5M", "write 500ms, 1s, 2m or 1h"),
        (Seconds, "25h", "at most 24h"),
        (Seconds, "1e3", "invalid time"),
        (Seconds, float("nan"), "invalid time nan"),
        (Seconds, 10**400, "invalid time of 1329 bits"),
        (Share, "12.5", "a bare number is at most 1, which is 100%; write 12.5%"),
        (Share, 90, "a bare number is at most 1"),
        (Share, "1/0", "invalid share '1/0'"),
        (Share, "0.5/2", "invalid share"),
        (Share, float("inf"), "invalid share inf"),
        (Share, "half", "write 12.5%, 1/8 or 0.125"),
        (Mark, "96s", "invalid size or share '96s'; write 256M, 1.5GiB, 12.5%, 1/8 or 0.125"),
        (Mark, "150%", "up to 100%"),
        (Mark, "0/8", "above 0"),
        (Mark, "1.5", "a bare number is at most 1"),
    ],
)
def test_an_error_names_the_text_and_what_is_accepted(
    kind: type, given: object, problem: str
) -> None:
    with pytest.raises(ValueError, match=r"write|at most|above|invalid|up to") as caught:
        kind.parse(given)  # type: ignore[attr-defined]
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_of_a_file_are_what_their_text_is() -> None:
    assert Share.parse(0.125) == Share.parse("0.125")
    assert Share.parse(1) == Share.parse("100%")
    assert Seconds.parse(0.00001) == Seconds.parse("10us")
    assert Seconds.parse(5) == Seconds.parse("5s")
    assert Mark.parse(0.5) == Mark.parse("50%")
    assert Mark.parse(1).size == 1


def test_an_argument_is_bounded_where_the_amount_is_not() -> None:
    for read, text in ((args.mem_bytes, "0"), (args.seconds, "0s"), (args.share, "0%")):
        with pytest.raises(argparse.ArgumentTypeError, match=repr(text)):
            read(text)
    with pytest.raises(argparse.ArgumentTypeError, match="150%"):
        args.share("150%")


@settings(deadline=None)
@given(st.integers(0, MAX_BYTES))
def test_sizes_read_back(n_bytes: int) -> None:
    assert Bytes.parse(str(Bytes(n_bytes))) == n_bytes


@settings(deadline=None)
@given(st.decimals(0, MAX_BYTES, places=3, allow_nan=False), st.sampled_from(sorted(UNITS)))
def test_a_size_is_exact_or_refused(number: object, unit: str) -> None:
    exact = Fraction(str(number)) * UNITS[unit]
    assume(exact <= MAX_BYTES)
    text = f"{number:f}{unit}"
    if unit and exact.denominator == 1:
        assert Bytes.parse(text) == exact
    else:
        with pytest.raises(ValueError, match="invalid size"):
            Bytes.parse(text)


@settings(deadline=None)
@given(st.decimals(0, MAX_SECONDS, places=6, allow_nan=False))
def test_times_and_shares_read_back(value: object) -> None:
    for text, kind in ((f"{value}s", Seconds), (f"{value}ms", Seconds), (f"{value}%", Share)):
        amount = kind.parse(text)  # type: ignore[attr-defined]
        assert kind.parse(str(amount)) == amount  # type: ignore[attr-defined]


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 1000))
def test_the_spellings_of_a_share_agree(part: int, whole: int) -> None:
    share = Share.parse(f"{part}/{whole}")
    assert Share.parse(f"{part * 10}/{whole * 10}") == share
    assert Share.parse(str(share)) == share
    if part <= whole:
        assert Share.parse(f"{share:.18f}") == pytest.approx(share, abs=1e-17)
        assert Share.parse(float(share)) == share


@settings(deadline=None)
@given(st.text(max_size=12) | st.text("0123456789.%/KMGTiBpagesuhn ", max_size=8))
def test_any_text_is_read_or_refused(text: str) -> None:
    for kind in KINDS:
        try:
            amount = kind.parse(text)
        except ValueError:
            continue
        assert kind.parse(str(amount)) == amount


@settings(deadline=None)
@given(st.integers() | st.floats() | st.booleans() | st.none() | st.lists(st.integers()))
def test_any_value_is_read_or_refused(value: object) -> None:
    for kind in KINDS:
        try:
            amount = kind.parse(value)
        except ValueError:
            continue
        assert kind.parse(str(amount)) == amount


@pytest.mark.parametrize(
    ("section", "key", "text"),
    [
        ("daemon", "interval", "0.5"),
        ("daemon", "interval", "2m"),
        ("daemon", "lease", "1h"),
        ("pressure", "psi_target", "0.125"),
        ("pressure", "psi_target", "1/8"),
        ("pressure", "total_budget", "1.5GiB"),
        ("limits", "cpu", "250%"),
        ("limits", "cpu", "5/2"),
        ("defaults", "budget", "0.5"),
        ("defaults", "budget", "8192pages"),
    ],
)
def test_a_file_and_a_flag_read_the_same(section: str, key: str, text: str, tmp_path: Path) -> None:
    assert _file(section, key, text, tmp_path / "reclaimd.toml") == _flag(key)(text)


@pytest.mark.parametrize("text", ["12.5%", "1/8", "0.125"])
def test_a_query_of_the_control_socket_reads_the_same(text: str) -> None:
    query = {"rearm": "sample", "fraction": text}
    assert decode_query(query, HarvestQuery).fraction == 0.125


@pytest.mark.parametrize("text", ["125%", "12.5", "1/65537", "0", "1e-3"])
def test_a_query_names_the_share_that_it_refuses(text: str) -> None:
    with pytest.raises(SchemaError, match=re.escape(text)) as caught:
        decode_query({"fraction": text}, HarvestQuery)
    assert caught.value.field == "fraction"
