"""The text interface of lru_gen, in the syntax of /sys/kernel/debug/lru_gen.

Reading it shows each VM (in place of the kernel's memory cgroup) with its generations,
the oldest first: sequence number, age in milliseconds, anonymous pages, file pages. All
pages of a guest count as anonymous, and there is one node, 0::

    memcg     1 vm1
     node     0
              4      12043        8190          0
              5       2007         310          0

Commands are written to it, separated by commas, semicolons or newlines; ``vm`` is the
number or the name of a VM:

``+ vm node seq [can_swap [full_scan]]``
    open a generation after ``seq``, which must be the youngest; an older ``seq`` is
    silently ignored. ``full_scan`` also sweeps the tables that the filter would skip.
``- vm node seq [swappiness [nr]]``
    evict the generations up to ``seq``, at most ``nr`` pages. Swappiness 0 excludes
    anonymous pages, and so all pages.

All commands of a text are parsed before the first one runs.

As in the kernel, ``can_swap`` is a swappiness and any value but 0 is true, ``full_scan``
is any number, and ``max`` is a swappiness (since "mm: use SWAPPINESS_ANON_ONLY in MGLRU",
v6.16).

Source: Documentation/admin-guide/mm/multigen_lru.rst and lru_gen_seq_write(), mm/vmscan.c,
Linux v6.12. Departs from it: the name is accepted as well as the number; aging does not
fail when all generations are open, because the two oldest are merged.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Protocol

from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy.base import Gfns, Mask
from kvmhost.reclaim.policy.lru_gen import DAEMON_CAPS, PROTECTED, LruGen, why_not
from kvmhost.reclaim.policy.lru_gen_tiers import N_TIERS

__all__ = [
    "MAX_SWAPPINESS",
    "AgeCommand",
    "Command",
    "EvictCommand",
    "Work",
    "parse",
    "parse_enabled",
    "run",
    "show",
    "show_enabled",
    "show_full",
]

MAX_SWAPPINESS = 200


@dataclasses.dataclass(frozen=True)
class AgeCommand:
    """``+``: open a generation after ``seq``."""

    vm: str
    seq: int
    can_swap: bool = True
    full_scan: bool = True


@dataclasses.dataclass(frozen=True)
class EvictCommand:
    """``-``: evict the generations up to ``seq``; ``nr_pages`` None: all of them."""

    vm: str
    seq: int
    swappiness: int = MAX_SWAPPINESS
    nr_pages: int | None = None


Command = AgeCommand | EvictCommand


class Work(Protocol):
    """Operations on the VM that a command requests from its caller."""

    def age(self, full_scan: bool) -> None:
        """Harvest, and pass the result to the policy."""

    def candidates(self) -> Mask:
        """Return the pages that may be evicted."""

    def evict(self, gfns: Gfns) -> int:
        """Evict pages, notify the policy, and return the number evicted."""


def show(number: int, name: str, policy: LruGen, pages: Mask, now_ns: int) -> str:
    """Return the generations of one VM as text.

    :param pages: the pages to count, usually the resident pages
    """
    lines = [f"memcg {number:5} {name}", f" node {0:5}"]
    for seq, n_pages in policy.sizes(pages):
        age_ms = max(now_ns - policy.births_ns.get(seq, 0), 0) // 1_000_000
        lines.append(f" {seq:10} {age_ms:10} {n_pages:11} {0:10}")
    return "".join(line + "\n" for line in lines)


def show_full(number: int, name: str, policy: LruGen, pages: Mask, now_ns: int) -> str:
    """Return the text of :func:`show` with the statistics of ``lru_gen_full``.

    Below each generation: one line per tier, with the averages R (refaulted) and T (total) at
    the youngest, the counts r (refaulted), e (evicted) and p (protected) at the oldest;
    then the sweep of the youngest generation: L, O, Y leaf entries in total, old and young,
    N, F, A tables in total, found by the filter, added to the next one. An ``x`` marks a
    column without a value.
    """
    lines = []
    youngest, oldest = policy.max_seq, policy.min_seq
    for line in show(number, name, policy, pages, now_ns).splitlines():
        lines.append(line)
        first = line.split()[0]
        if first.isdigit():
            seq = int(first)
            lines += [_tier_line(policy, tier, seq, youngest, oldest) for tier in range(N_TIERS)]
            marks = "LOYNFA" if seq == youngest else "xxxxxx"
            values = policy.mm_stats.values() if seq == youngest else (0,) * 6
            columns = [f" {n:10}{mark}" for n, mark in zip(values, marks, strict=True)]
            lines.append(" " * 22 + "".join(columns))
    return "".join(line + "\n" for line in lines)


def _tier_line(policy: LruGen, tier: int, seq: int, youngest: int, oldest: int) -> str:
    tiers = policy.tiers
    marks, values = "xxx", (0, 0, 0)
    if seq == youngest:
        marks, values = "RTx", (int(tiers.avg_refaulted[tier]), int(tiers.avg_total[tier]), 0)
    elif seq == oldest:
        counts = (tiers.refaulted, tiers.evicted, tiers.protected)
        marks = "rep"
        values = (int(counts[0][tier]), int(counts[1][tier]), int(counts[2][tier]))
    columns = "".join(f" {n:10}{mark}" for n, mark in zip(values, marks, strict=True))
    return f"            {tier:10}" + columns + "".join(f" {0:10}x" for _ in range(3))


def show_enabled(policy: LruGen) -> str:
    """Return the mask of capabilities as ``/sys/kernel/mm/lru_gen/enabled`` shows it."""
    return f"0x{int(policy.caps):04x}\n"


def parse_enabled(text: str, policy: LruGen) -> int:
    """Return the mask that a text stands for, as that file takes it.

    ``n...`` is 0, ``y...`` all that can be switched on, anything else a number in decimal,
    octal (0...) or hexadecimal (0x...). Where the kernel ignores a capability that it does not
    have, this is an error.

    :raises LayoutError: if it is none of these, or a daemon cannot run with the mask
    """
    word = text.strip()
    if word[:1] in ("n", "N"):
        return 0
    if word[:1] in ("y", "Y"):
        return int(DAEMON_CAPS)
    match = re.fullmatch(r"0[xX]([0-9a-fA-F]{1,8})|0([0-7]{1,11})|(0|[1-9][0-9]{0,9})", word)
    if match is None:
        raise LayoutError(f"lru_gen enabled: {word[:40]!r} is neither y, n nor a number")
    hexadecimal, octal, decimal = match.groups()
    caps = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
    reason = why_not(caps, policy.probes)
    if reason:
        raise LayoutError(f"lru_gen enabled: {reason}")
    return caps


def parse(text: str) -> list[Command]:
    """Parse commands.

    :raises LayoutError: names the command, the field and the accepted values
    """
    commands = []
    for number, part in enumerate(re.split(r"[,;\n]", text), 1):
        if part.strip():
            commands.append(_parse_one(number, part))
    return commands


def _parse_one(number: int, text: str) -> Command:
    where = f"lru_gen command {number} ({text.strip()!r})"
    # As for sscanf, no space is needed after the sign.
    sign, words = text.strip()[0], text.strip()[1:].split()
    if sign not in "+-":
        raise LayoutError(f"{where}: begins with {sign!r}, need + to age or - to evict")
    optional = ("can_swap", "full_scan") if sign == "+" else ("swappiness", "nr")
    fields = ("vm", "node", "seq", *optional)
    if not 3 <= len(words) <= len(fields):
        raise LayoutError(
            f"{where}: {len(words)} fields, need {sign} vm node seq [{optional[0]} [{optional[1]}]]"
        )
    values = {
        field: _number(where, field, word)
        for field, word in zip(fields[1:], words[1:], strict=False)
    }
    if values["node"]:
        raise LayoutError(f"{where}: node {values['node']}, there is only node 0")
    if sign == "+":
        return AgeCommand(
            words[0],
            values["seq"],
            bool(_at_most(where, "can_swap", values.get("can_swap", 1), MAX_SWAPPINESS)),
            bool(values.get("full_scan", 1)),
        )
    swappiness = values.get("swappiness", MAX_SWAPPINESS)
    _at_most(where, "swappiness", swappiness, MAX_SWAPPINESS)
    return EvictCommand(words[0], values["seq"], swappiness, values.get("nr"))


def _number(where: str, field: str, word: str) -> int:
    if word == "max" and field in ("can_swap", "swappiness"):
        return MAX_SWAPPINESS
    if not re.fullmatch(r"[0-9]{1,18}", word):
        raise LayoutError(f"{where}: {field} {word!r} is not a number of 0 or more")
    return int(word)


def _at_most(where: str, field: str, value: int, most: int) -> int:
    if value > most:
        raise LayoutError(f"{where}: {field} {value}, need 0 to {most}")
    return value


def run(command: Command, policy: LruGen, work: Work) -> int:
    """Run one command on a VM's policy; return the number of pages evicted.

    :raises LayoutError: if the generation does not exist yet, or is protected
    """
    if isinstance(command, AgeCommand):
        if command.seq > policy.max_seq:
            raise LayoutError(f"+ {command.vm}: seq {command.seq}, youngest is {policy.max_seq}")
        if command.seq == policy.max_seq:
            work.age(command.full_scan)
        return 0
    if command.seq + PROTECTED > policy.max_seq:
        raise LayoutError(
            f"- {command.vm}: seq {command.seq} is protected, "
            f"youngest that may go is {policy.max_seq - PROTECTED}"
        )
    if not command.swappiness:
        return 0
    gfns = policy.up_to(command.seq, work.candidates())
    return work.evict(gfns if command.nr_pages is None else gfns[: command.nr_pages])
