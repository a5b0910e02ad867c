"""The pager: evicts pages of a running guest and brings them back on a touch."""

from kvmhost.pager.pager import EvictOutcome, EvictResult, Pager, PageState
from kvmhost.pager.userfault import Userfault

__all__ = ["EvictOutcome", "EvictResult", "PageState", "Pager", "Userfault"]
