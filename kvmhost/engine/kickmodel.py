"""A model of the vCPU kick for the explorer: one flag, one signal, any number of kickers.

``kh_vcpu_kick()`` and ``kh_vcpu_run()`` in ``_core/vcpu.c`` and the loop of
:class:`~kvmhost.machine.runner.Runner` take these steps; the C code has their names in
brackets:

========== ============ =================================================================
who        step         in the code
========== ============ =================================================================
kicker     ``request``  ``Runner.pause``, ``request_stop``: what the vCPU is to see
kicker     ``raise``    store 1 to ``immediate_exit``
kicker     ``look``     load ``tid``
kicker     ``signal``   ``tgkill``, if ``tid`` was there
vCPU       ``publish``  store ``tid``, and a full fence
vCPU       ``enter``    the system call ``KVM_RUN`` begins: a signal now waits for it
vCPU       ``check``    the kernel loads ``immediate_exit``: if set, ``EINTR``
vCPU       ``guest``    guest code, until a signal: ``EINTR``
vCPU       ``lower``    exchange ``immediate_exit`` with 0
vCPU       ``withdraw`` store 0 to ``tid``
vCPU       ``see``      ``Runner._park``: look at what is requested
========== ============ =================================================================

A signal that comes while the thread is outside ``KVM_RUN`` runs its handler and interrupts
nothing. Memory is sequentially consistent here, as the fences make it in the code.
Simplification: the vCPU leaves guest mode only for kicks; the model ends when it is in guest mode
and every kick is over.
"""

from __future__ import annotations

from kvmhost.mmu.explorer import BLOCKED, Report, State, Step, explore

__all__ = ["KICKS", "LOWERINGS", "explore_kicks"]

_END = 99
#: Flag and signal of one kick may each arrive after the request was seen, and cause one
#: spurious return of the vCPU. More of them mean that it spins.
_LATE = 2


def _request(s: State) -> None:
    s["requested"] += 1


def _raise_flag(s: State) -> None:
    s["flag"] = True


def _raise_word(s: State) -> None:
    s["kicked"] = True


def _look(who: str) -> Step:
    def look(s: State) -> None:
        s[f"tid {who}"] = s["tid"]

    return look


def _signal(who: str) -> Step:
    def signal(s: State) -> None:
        if s[f"tid {who}"] and s["inside"]:
            s["pending"] = True
        s["over"] += 1

    return signal


def _refused(s: State) -> None:
    """End a kick whose signal could not be queued: RLIMIT_SIGPENDING."""
    s["over"] += 1


def _kick(order: str, who: str) -> list[Step]:
    look, signal = _look(who), _signal(who)
    return {
        "raise, look, signal": [_request, _raise_flag, look, signal],
        "look, raise, signal": [_request, look, _raise_flag, signal],
        "raise, signal refused": [_request, _raise_flag, look, _refused],
        "two words": [_request, _raise_word, _raise_flag, look, signal],
    }[order]


def _publish(s: State) -> None:
    s["tid"] = True


def _enter(s: State) -> None:
    s["inside"] = True


def _withdraw(s: State) -> None:
    s["tid"] = False


def _lower(s: State) -> None:
    s["flag"] = False


def _take_word(s: State) -> None:
    """Clear the word; clear ``flag`` only if the word was set, as in the first version."""
    s["took"], s["kicked"] = s["kicked"], False


def _lower_if_taken(s: State) -> None:
    if s["took"]:
        s["flag"] = False


def _raise_again(s: State) -> None:
    if s["took"] and s["kicked"]:
        s["flag"] = True


_LOWERINGS: dict[str, list[Step]] = {
    "lower, then see": [_lower],
    "see, then lower": [],
    "two words": [_take_word, _lower_if_taken, _raise_again],
}


def _vcpu(lowering: str, kickers: int) -> list[Step]:
    before = _LOWERINGS[lowering]
    after: list[Step] = [_lower] if lowering == "see, then lower" else []
    returned = 4

    def check(s: State) -> int | None:
        if not s["flag"]:
            return None
        s["inside"] = False
        return returned

    def guest(s: State) -> object:
        if s["pending"]:
            s["inside"] = s["pending"] = False
            return None
        return _END if s["over"] == kickers else BLOCKED

    def see(s: State) -> None:
        if s["seen"] == s["requested"]:
            s["idle"] += 1
        s["seen"] = s["requested"]

    def again(s: State) -> int:
        return _END if s["idle"] > _LATE * kickers else 0

    return [_publish, _enter, check, guest, *before, _withdraw, see, *after, again]


#: The order of steps of a kicker, and of the vCPU's thread.
KICKS = ("raise, look, signal", "look, raise, signal", "raise, signal refused", "two words")
LOWERINGS = tuple(_LOWERINGS)


def explore_kicks(kick: str, lowering: str, *, kickers: int = 2) -> Report:
    """Explore one vCPU and several kickers in all orders.

    A schedule fails if the vCPU is in guest mode at the end and has not seen a request, or
    if it has more spurious returns than late flags and signals explain: then the flag is
    set and never cleared.

    :param kick: one of :data:`KICKS`; the code has the first
    :param lowering: one of :data:`LOWERINGS`; the code has the first
    """
    state: State = {
        "requested": 0,
        "seen": 0,
        "flag": False,
        "kicked": False,
        "took": False,
        "tid": False,
        "inside": False,
        "pending": False,
        "over": 0,
        "idle": 0,
    }
    actors: dict[str, list[Step]] = {"vcpu": _vcpu(lowering, kickers)}
    for i in range(kickers):
        state[f"tid {i}"] = False
        actors[f"kicker {i}"] = _kick(kick, str(i))

    def seen_and_at_rest(s: State) -> bool:
        return bool(s["seen"] == s["requested"] and s["idle"] <= _LATE * kickers)

    return explore(state, actors, seen_and_at_rest)
