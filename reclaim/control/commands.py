"""The text interface of lru_gen on the VMs of a daemon: show generations, age, evict."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvmhost.errors import LayoutError
from kvmhost.reclaim.account.decisions import DecisionKind, EvictReason
from kvmhost.reclaim.policy import lru_gen_text
from kvmhost.reclaim.policy.base import Gfns, Mask
from kvmhost.reclaim.policy.lru_gen import Caps, LruGen
from kvmhost.reclaim.vm.session import Session

__all__ = ["enabled", "run_text", "show_text"]


class _SessionWork:
    """Runs a command on a session. The caller holds the session's lock."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def age(self, full_scan: bool) -> None:
        """Harvest and age."""
        self._session.age_once(full_scan)

    def candidates(self) -> Mask:
        """Return the pages that may be evicted."""
        return self._session.pages.candidates

    def evict(self, gfns: Gfns) -> int:
        """Evict pages in the same way as a pass."""
        session = self._session
        outcomes = session.evictor.evict(
            gfns, EvictReason.COMMAND, EvictReason.COMMAND.text, passes=session.passes
        )
        return outcomes.get("done", 0)


def show_text(sessions: Sequence[Session], vm: str | None, full: bool = False) -> str:
    """Return the generations of one VM, or of all VMs with the policy lru_gen.

    :param full: with the statistics of the kernel's ``lru_gen_full``
    :raises LayoutError: if the VM is not managed, or uses another policy
    """
    text = ""
    show = lru_gen_text.show_full if full else lru_gen_text.show
    for number, session in enumerate(sessions, 1):
        policy = session.driver.policy
        if vm not in (None, session.vm) or (vm is None and not isinstance(policy, LruGen)):
            continue
        with session.lock:
            text += show(
                number, session.vm, _lru_gen(session), session.pages.candidates, time.monotonic_ns()
            )
    if vm is not None and not text:
        raise LayoutError(f"VM {vm!r} is not managed by this daemon")
    return text


def enabled(sessions: Sequence[Session], vm: str, value: str | None) -> str:
    """Return the capabilities of a VM's policy, after setting them if a value is given.

    :raises LayoutError: if the VM has another policy, or the value is refused
    """
    session = _named(sessions, vm)
    with session.lock:
        policy = _lru_gen(session)
        if value is not None:
            before, policy.caps = policy.caps, Caps(lru_gen_text.parse_enabled(value, policy))
            session.context.decisions.add(
                DecisionKind.COMMAND,
                f"lru_gen enabled: 0x{int(before):04x} to 0x{int(policy.caps):04x}",
                vm=session.vm,
                passes=session.passes,
            )
        return lru_gen_text.show_enabled(policy)


def run_text(sessions: Sequence[Session], text: str) -> int:
    """Parse all commands and find their VMs, then run them; return the number of evicted pages.

    A generation is checked when its command runs: commands before it have been done then, as
    in the kernel's file.

    :raises LayoutError: naming the command and what is wrong with it
    """
    pages = 0
    found = [(command, _named(sessions, command.vm)) for command in lru_gen_text.parse(text)]
    for _, session in found:
        _lru_gen(session)
    for command, session in found:
        with session.lock:
            policy = _lru_gen(session)
            evicted = lru_gen_text.run(command, policy, _SessionWork(session))
        session.context.decisions.add(
            DecisionKind.COMMAND, f"{command}", vm=session.vm, passes=session.passes, pages=evicted
        )
        pages += evicted
    return pages


def _named(sessions: Sequence[Session], name: str) -> Session:
    """Find a VM by its name, or by the number that :func:`show_text` gives it."""
    for number, session in enumerate(sessions, 1):
        if name in (session.vm, str(number)):
            return session
    raise LayoutError(f"VM {name!r} is not managed by this daemon")


def _lru_gen(session: Session) -> LruGen:
    policy = session.driver.policy
    if not isinstance(policy, LruGen):
        raise LayoutError(f"VM {session.vm!r} has the policy {policy.name}, not lru_gen")
    return policy
