from __future__ import annotations

import json
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhost.control import schema
from kvmhost.control.schema import SchemaError
from kvmhost.units import Bytes, MaxShare, Seconds, Share


@pytest.mark.parametrize(
    ("body", "kind", "field"),
    [
        (b'{"resident_max_bytes": -1}', schema.LimitRequest, "resident_max_bytes"),
        (b'{"resident_max_bytes": "1"}', schema.LimitRequest, "resident_max_bytes"),
        (b'{"resident_max_bytes": 1, "more": 1}', schema.LimitRequest, "more"),
        (b"{}", schema.LimitRequest, "resident_max_bytes"),
        (b'{"gfns": [1, 2, "x"]}', schema.EvictRequest, "gfns[2]"),
        (b'{"gfns": [4503599627370496]}', schema.EvictRequest, "gfns[0]"),
        (b'{"gfn_start": 1, "n_pages": 0}', schema.RestoreRequest, "n_pages"),
        (b"[]", schema.EvictRequest, ""),
        (b"{", schema.EvictRequest, ""),
        (b"", schema.EvictRequest, ""),
    ],
)
def test_bad_bodies_name_the_field(body, kind, field):
    with pytest.raises(SchemaError) as caught:
        schema.decode(body, kind)
    assert caught.value.field == field
    assert "$" not in str(caught.value)


def test_queries_take_hex_and_booleans():
    asked = schema.decode_query(
        {"gfn_start": "0x400", "n_pages": "12", "clear": "0", "rearm": "all"}, schema.HarvestQuery
    )
    assert asked == schema.HarvestQuery(0x400, 12, clear=False, rearm="all")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"gfn_start": "-1"}, "gfn_start"),
        ({"gfn_start": "0xzz"}, "gfn_start"),
        ({"n_pages": "1.5"}, "n_pages"),
        ({"clear": "maybe"}, "clear"),
        ({"rearm": "some"}, "rearm"),
        ({"x": "1"}, "x"),
    ],
)
def test_bad_queries_name_the_field(query, field):
    with pytest.raises(SchemaError) as caught:
        schema.decode_query(query, schema.HarvestQuery)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("given", "kind", "wanted"),
    [
        ({"start_gfn": "1"}, schema.HarvestQuery, "'gfn_start'?"),
        ({"pages": "1"}, schema.RangeQuery, "gfn_start, n_pages"),
        ({"max_resident_bytes": "1"}, schema.LimitRequest, "'resident_max_bytes'?"),
        ({"x": "1"}, schema.NoQuery, "unknown name 'x'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_right_one(given, kind, wanted):
    for decode in (
        lambda: schema.decode_query(given, kind),
        lambda: schema.decode(json.dumps(given).encode(), kind),
    ):
        with pytest.raises(SchemaError, match=re.escape(wanted)) as caught:
            decode()
        assert caught.value.field == next(iter(given))


@given(st.lists(st.integers(0, 2**52 - 1)))
def test_gfn_lists_go_round(gfns):
    message = schema.EvictRequest(gfns)
    assert schema.decode(schema.encode(message), schema.EvictRequest) == message


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_in_one_way(body):
    try:
        message = schema.decode(body, schema.RestoreRequest)
    except SchemaError as error:
        problem = error.problem
    else:
        problem = "" if message.n_pages < 1 else "none"
    assert problem


@pytest.mark.parametrize(
    "body", [b'{"gfn": 1, "\xff": 1}', b'{"gfn": "\xff"}', b'{"gfn":' + b"[" * 100_000, b"1e999"]
)
def test_what_python_cannot_hold_is_a_schema_error(body):
    with pytest.raises(schema.SchemaError):
        schema.decode(body, schema.RestoreRequest)


def test_a_path_with_a_nul_is_refused():
    with pytest.raises(schema.SchemaError):
        schema.decode(b'{"path": "/tmp/a\\u0000b"}', schema.SnapshotRequest)


def test_amounts_are_numbers_in_messages() -> None:
    class Message(msgspec.Struct):
        values: list[float]

    amounts = [Share(0.5), MaxShare(0.03), Seconds(2), Bytes(4096)]
    assert schema.encode(Message(amounts)) == b'{"values":[0.5,0.03,2.0,4096]}'
    with pytest.raises(TypeError, match="object is not a value of JSON"):
        schema.encode(Message([object()]))  # type: ignore[list-item]
