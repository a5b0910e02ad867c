"""The text interface of lru_gen on the VMs of a daemon: show generations, age, evict."""

from __future__ import annotations

from collections.abc import Sequence

from kvmhost.errors import CapabilityError
from reclaim.session import Session

__all__ = ["run_text", "show_text"]


def show_text(sessions: Sequence[Session], vm: str | None) -> str:
    """Return the generations of one VM, or of all.

    :raises CapabilityError: the policy has no text interface
    """
    raise _missing()


def run_text(sessions: Sequence[Session], text: str) -> int:
    """Run commands; return how many pages went.

    :raises CapabilityError: the policy has no text interface
    """
    raise _missing()


def _missing() -> CapabilityError:
    return CapabilityError("lru_gen text", "a policy with that interface", "none", "evict by gfn")
