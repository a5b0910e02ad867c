"""Requests that a server refuses, sent over its socket: they change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from raw_http import ask

__all__ = ["Refusal", "assert_refused_untouched", "refusals"]

#: Query, body, and the status and field of the error.
Refusal = tuple[str, bytes, int, str]


def refusals(own: list[Refusal], *, takes_body: bool, is_json: bool = True) -> list[Refusal]:
    """Return a route's own cases, and those of every route.

    :param is_json: whether the body that it takes is JSON
    """
    # What no route takes: an unknown parameter, and a body where there is none to take.
    cases = [*own, ("nosuch=1", b"", 400, "nosuch")]
    if not takes_body:
        cases.append(("", b"{}", 400, "body"))
    elif is_json:
        cases += [("", b'{"nosuch": 1}', 400, "nosuch"), ("", b"\xff\xfe", 400, "")]
    return cases


def assert_refused_untouched(
    server: Any, method: str, path: str, cases: list[Refusal], whole_state: Callable[[], object]
) -> None:
    """Send each case; compare the error, and the whole state before and after it."""
    before = whole_state()
    for query, body, status, field in cases:
        got, text = ask(server, method, f"{path}?{query}" if query else path, body)
        error = json.loads(text)["error"]
        assert (got, error["field"]) == (status, field), (query, body, text)
        assert set(error) == {"status", "message", "field", "kind", "arguments"}
        assert error["status"] == status
        assert error["message"]
        assert whole_state() == before, (query, body)
