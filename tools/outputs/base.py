"""Print the structures of ``--json``: one JSON object per line, in ASCII.

A command prints one object, or one per event where :mod:`~kvmhost.tools.outputs.registry`
says so. Keys have the order of the structure; every key is there every time. A command
that fails prints an :class:`ErrorOutput`, besides its message on standard error.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec

from kvmhost.decoding import json_value
from kvmhost.errors import KvmHostError, fields_of

__all__ = ["ErrorOutput", "Failure", "Output", "emit", "emit_error", "line_of"]


class Output(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the structures; the docstring under a field is its meaning on docs/json.md.

    Numbers have their unit in the name: ``n_pages``, ``window_s``, ``young_share``.
    """


class Failure(Output, frozen=True, kw_only=True):
    """Why a command failed."""

    exit_code: int
    """the exit code of the command"""
    message: str
    """the message that is on standard error, without the name of the command"""
    field: str
    """the argument or the field of a request that was wrong; empty if none is named"""
    kind: str
    """the class of the error, one of kvmhost.errors; empty for other errors"""
    arguments: list[Any]
    """the arguments of that class, as in the errors of the control API"""


class ErrorOutput(Output, frozen=True, kw_only=True):
    """The output of a command that failed."""

    error: Failure
    """why it failed"""


def emit(output: msgspec.Struct) -> None:
    """Print one structure to standard output, as one line.

    The line is written in one piece, so that lines of several threads do not mix.
    """
    sys.stdout.write(line_of(output) + "\n")


def line_of(output: msgspec.Struct) -> str:
    """Return one structure as a line, without its end."""
    # ASCII, because the terminal's filter would replace control characters in a string.
    return json.dumps(msgspec.to_builtins(output), allow_nan=False)


def emit_error(error: BaseException, message: str, exit_code: int) -> None:
    """Print the :class:`ErrorOutput` of an error."""
    kind, values = fields_of(error) if isinstance(error, KvmHostError) else ("", [])
    emit(
        ErrorOutput(
            error=Failure(
                exit_code=exit_code,
                message=message,
                field=str(getattr(error, "field", "") or ""),
                kind=kind,
                arguments=[json_value(value) for value in values],
            )
        )
    )
