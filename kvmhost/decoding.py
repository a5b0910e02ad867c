"""Decodes untrusted JSON and msgpack, and makes values that JSON has.

Any defect raises one kind of error: msgspec has its own exception, but does not convert
Python's exceptions for text that is not UTF-8, for nesting that is too deep, and for numbers
out of range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

__all__ = ["decode_json", "decode_msgpack", "json_value"]

T = TypeVar("T")


def decode_json(raw: bytes, kind: type[T]) -> T:
    """Decode a JSON value of a type.

    :raises msgspec.DecodeError: if it is none
    """
    return _decode(msgspec.json.decode, raw, kind)


def decode_msgpack(raw: bytes, kind: type[T]) -> T:
    """Decode a msgpack value of a type.

    :raises msgspec.DecodeError: if it is none
    """
    return _decode(msgspec.msgpack.decode, raw, kind)


def json_value(value: Any) -> Any:
    """Return a value as JSON has it; what JSON lacks becomes text."""
    if isinstance(value, Mapping):
        return {str(name): json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    fits = isinstance(value, int) and -(1 << 63) <= value < 1 << 64
    return value if value is None or fits or isinstance(value, str | float) else str(value)


def _decode(decoder: Callable[..., Any], raw: bytes, kind: type[T]) -> T:
    try:
        found: T = decoder(raw, type=kind)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(f"bad UTF-8 at byte {error.start}: {error.reason}") from None
    except RecursionError:
        raise msgspec.DecodeError("nested too deeply") from None
    except OverflowError as error:
        raise msgspec.DecodeError(f"a number is out of range: {error}") from None
    return found
