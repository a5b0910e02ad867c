"""Explain one page: its state, and what the next pass would do with it."""

from __future__ import annotations

from kvmhost.errors import LayoutError
from kvmhost.reclaim.control.schema import PageAnswer
from kvmhost.reclaim.vm.session import Session

__all__ = ["explain"]

#: Maximum number of decisions shown.
_DECISIONS = 20


def explain(session: Session, gfn: int) -> PageAnswer:
    """Return everything known about a page. The caller holds the session's lock.

    :raises LayoutError: if the VM has no such page
    """
    pages = session.pages
    if not 0 <= gfn < pages.n_pages:
        raise LayoutError(f"gfn {gfn:#x}: VM {session.vm!r} ends at {pages.n_pages:#x}")
    policy = session.driver.policy
    return PageAnswer(
        vm=session.vm,
        gfn=gfn,
        resident=bool(pages.resident[gfn]),
        movable=bool(pages.movable[gfn]),
        policy=policy.name,
        policy_state=dict(policy.explain(gfn)),
        verdict=_verdict(session, gfn),
        story=None if session.history is None else session.history.story(gfn),
        decisions=session.context.decisions.last(_DECISIONS, vm=session.vm, gfn=gfn),
    )


def _verdict(session: Session, gfn: int) -> str:
    pages = session.pages
    if not pages.movable[gfn]:
        return "stays: pinned (page tables or parameters), or not memory"
    if session.passes == 0:
        return "unknown: no pass has run yet"
    if not pages.resident[gfn]:
        return "evicted or never touched: the next access makes it resident"
    only = pages.candidates & False
    only[gfn] = True
    if not session.driver.victims(1, only, probe=False).size:
        return "stays: the policy protects it"
    target = session.pass_target
    if target is None or not target.demand.pages:
        return "evictable, but no pages have to be evicted now"
    if not target.pages:
        return f"evictable, but the pass is limited: {target.limited_by}"
    return f"will be evicted in its turn: {target.demand.text}"
