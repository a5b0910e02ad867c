"""One page, explained: what the daemon knows of it and what it would do with it now."""

from __future__ import annotations

from kvmhost.errors import LayoutError
from kvmhost.reclaim.control.schema import PageAnswer
from kvmhost.reclaim.vm.session import Session

__all__ = ["explain"]

#: Of the decisions that list the page, so many are shown.
_DECISIONS = 20


def explain(session: Session, gfn: int) -> PageAnswer:
    """Tell all about a page. The caller holds the session's lock.

    :raises LayoutError: if the VM has no such page
    """
    view = session.view
    if not 0 <= gfn < view.n_pages:
        raise LayoutError(f"gfn {gfn:#x}: VM {session.vm!r} ends at {view.n_pages:#x}")
    policy = session.judge.policy
    return PageAnswer(
        vm=session.vm,
        gfn=gfn,
        resident=bool(view.resident[gfn]),
        movable=bool(view.movable[gfn]),
        policy_name=policy.name,
        policy=dict(policy.explain(gfn)),
        verdict=_verdict(session, gfn),
        story=None if session.history is None else session.history.story(gfn),
        decisions=session.common.decisions.last(_DECISIONS, vm=session.vm, gfn=gfn),
    )


def _verdict(session: Session, gfn: int) -> str:
    view = session.view
    if not view.movable[gfn]:
        return "stays: pinned, since live tables or parameters are in it, or no memory at all"
    if session.passes == 0:
        return "not known: there was no pass yet"
    if not view.resident[gfn]:
        return "is away: comes back when something touches it"
    one = view.candidates & False
    one[gfn] = True
    if not session.judge.victims(1, one, probe=False).size:
        return "stays: the policy protects it"
    ruling = session.ruling
    if ruling is None or not ruling.want.pages:
        return "could go, and stays: nothing has to go now"
    if not ruling.pages:
        return f"could go, and stays: {ruling.kept}"
    return f"goes when its turn comes: {ruling.want.text}"
