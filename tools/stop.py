"""``kvmhost stop VM…``: end running VMs, and wait until they have ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from kvmhost.control.client import Client
from kvmhost.control.listing import is_listening
from kvmhost.errors import KvmHostError, VmGoneError
from kvmhost.printable import printable
from kvmhost.tools.ending import EXIT_TIMEOUT, exit_code
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.vms import EndedRow, StopOutput
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option, add_vm

__all__ = ["main", "parser"]

_ASK_AGAIN_S = 0.05


def main(argv: Sequence[str]) -> int:
    """Run the command; return 0 if all have ended, 124 if one did not end in time.

    Otherwise return the largest exit code of what went wrong: 1 for a VM that is not there.
    """
    args = parser().parse_args(argv)
    problems = _stop_all(args.vm, time.monotonic() + args.timeout, args.timeout)
    if args.json:
        emit(StopOutput(vms=[_row(vm, problems.get(vm)) for vm in args.vm]))
    for vm in args.vm:
        if vm in problems:
            print(f"kvmhost stop: {printable(problems[vm])}", file=sys.stderr)
        elif not args.json:
            print(f"{printable(vm)}: ended")
    if any(isinstance(error, TimeoutError) for error in problems.values()):
        return EXIT_TIMEOUT
    return max(map(exit_code, problems.values()), default=0)


def _stop_all(vms: Sequence[str], deadline_s: float, timeout_s: float) -> dict[str, Exception]:
    """Ask all of them to end, then wait for each; return what went wrong, by VM."""
    problems: dict[str, Exception] = {}
    for vm in vms:
        client = Client(vm, timeout_s=timeout_s)
        try:
            with client:
                client.stop()
        except VmGoneError as error:
            late = is_listening(client.path)
            problems[vm] = TimeoutError(str(error)) if late else error
        except KvmHostError as error:
            problems[vm] = error
    for vm in vms:
        if vm not in problems and not _ends(vm, deadline_s):
            problems[vm] = TimeoutError(f"{vm}: has not ended within {timeout_s:g} s")
    return problems


def _row(vm: str, problem: Exception | None) -> EndedRow:
    return EndedRow(vm=vm, ended=problem is None, problem="" if problem is None else str(problem))


def _ends(vm: str, deadline_s: float) -> bool:
    """Wait until a VM answers no more."""
    with Client(vm, timeout_s=max(0.1, deadline_s - time.monotonic())) as client:
        while time.monotonic() < deadline_s:
            try:
                client.state()
            except VmGoneError:
                return True
            time.sleep(_ASK_AGAIN_S)
    return False


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost stop",
        description="End running VMs, and wait until they have ended. What a guest holds in "
        "memory is gone: kvmhost snapshot VM FILE --stop keeps it.",
        epilog="Exit codes: 1 if a VM refused or was not there, 124 if one did not end in time.",
    )
    add_vm(parser, nargs="+")
    add_option(
        parser,
        "--timeout",
        default="1m",
        help="stop waiting after this time, with exit code 124; the VM continues to end",
    )
    add_option(parser, "--json")
    return parser
