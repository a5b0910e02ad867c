"""``kvmhost page``: the known state of one guest page, and why it was evicted or kept."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from kvmhost.control.client import Client
from kvmhost.control.schema import Page
from kvmhost.errors import ControlError, LayoutError, VmGoneError
from kvmhost.printable import printable
from kvmhost.reclaim.account.decisions import Decision
from kvmhost.reclaim.control.client import DaemonClient
from kvmhost.reclaim.control.schema import PageAnswer
from kvmhost.tools.args import gfn
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.daemons import PageOutput
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option, add_vm

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    with Client(args.vm) as client:
        name, page = client.state().name, client.page(args.gfn)
    known, problem = _ask_daemon(args, name)
    if args.json:
        emit(PageOutput(vm=name, page=page, daemon=known, problem=problem))
        return 0
    for label, text in _lines(page, known):
        print(f"{label:<12} {printable(text)}")
    if problem:
        print(f"kvmhost page: {printable(problem)}", file=sys.stderr)
    return 0


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost page",
        description="Explain one page: where it is, when it was young, what was done to it and "
        "why, and what the policy would do with it now. The VM reports the state; the daemon that "
        "manages the VM reports history and reasons. Without a daemon, only the state is shown.",
    )
    add_vm(parser)
    parser.add_argument("gfn", metavar="GFN", type=gfn, help="guest frame number; 0x for hex")
    add_option(parser, "--daemon")
    add_option(parser, "--json")
    return parser


def _ask_daemon(args: argparse.Namespace, name: str) -> tuple[PageAnswer | None, str]:
    """Return the daemon's answer, or the reason why there is none."""
    try:
        daemon = DaemonClient(args.daemon) if args.daemon else DaemonClient.of_vm(args.vm)
        with daemon:
            for vm in dict.fromkeys((args.vm, name)):
                try:
                    return daemon.page(vm, args.gfn), ""
                except (ControlError, LayoutError) as error:
                    problem = str(error)
        return None, problem
    except VmGoneError as error:
        return None, f"no history: {error}"


def _lines(page: Page, known: PageAnswer | None) -> list[tuple[str, str]]:
    where = "in memory" if page.resident else "not in memory"
    lines = [
        ("gfn", f"{page.gfn:#x}, gpa {page.gpa:#x}"),
        ("slot", f"{page.slot}, offset {page.slot_offset_bytes:#x}"),
        ("hva", f"{page.hva:#x}"),
        ("state", f"{page.state}, {where}{', pinned' if page.pinned else ''}"),
    ]
    if page.stored_bytes:
        lines.append(("store", f"{page.stored_bytes} bytes"))
    if known is None:
        return lines
    lines.append((known.policy, ", ".join(f"{k} {v}" for k, v in known.policy_state.items())))
    if known.story is not None:
        story = known.story
        bits = "".join("1" if young else "." for young in story.windows)
        lines += [
            ("windows", f"{bits or 'none yet'} (newest first, 1 is young, pass {story.passes})"),
            ("generations", _joined(story.young_passes, story.passes)),
            ("evictions", f"{story.evictions}, came back {story.refaults}"),
            ("last action", f"{story.action} in pass {story.action_pass}, {story.why_text}"),
        ]
    lines.append(("now", known.verdict))
    lines += [("decision", _decision(decision)) for decision in known.decisions]
    return lines


def _joined(joined: list[int], passes: int) -> str:
    if not joined:
        return "joined none in these windows"
    shown = ", ".join(str(number) for number in joined[:8])
    return f"joined the youngest one at pass {shown}{', ...' if len(joined) > 8 else ''}"


def _decision(decision: Decision) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(decision.time_s))
    why = f" ({decision.why})" if decision.why else ""
    return f"{at} pass {decision.passes}: {decision.kind}{why}: {decision.text}"
