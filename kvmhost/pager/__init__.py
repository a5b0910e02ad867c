"""The pager: evicts pages of a running guest and brings them back on a touch."""

from kvmhost.pager.pager import Pager
from kvmhost.pager.results import (
    DropResult,
    EvictOutcome,
    EvictResult,
    PageState,
    RestoreResult,
)
from kvmhost.pager.userfault import Userfault

__all__ = [
    "DropResult",
    "EvictOutcome",
    "EvictResult",
    "PageState",
    "Pager",
    "RestoreResult",
    "Userfault",
]
