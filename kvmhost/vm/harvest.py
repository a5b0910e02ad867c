"""Arguments and result of a harvest, the same for a machine, its client and a process.

:class:`Harvestable` has the one list of arguments; whoever can be harvested implements
:meth:`Harvestable.run_harvest` on a :class:`HarvestRequest`, which is checked.
"""

from __future__ import annotations

import abc
import dataclasses
import typing

from kvmhost.errors import LayoutError
from kvmhost.vm.checks import check_gfns, check_mask, check_view, range_within
from kvmhost.vm.names import (
    DEFAULT_VIEW,
    REARM,
    TABLE_FORMATS,
    Rearm,
    TableFormat,
    check_name,
)

if typing.TYPE_CHECKING:
    from kvmhost.bitmap import Words, YoungBitmap

__all__ = ["MIN_FRACTION", "Harvest", "HarvestRequest", "Harvestable"]

#: The smallest part of the pages that a harvest with ``rearm="sample"`` clears.
MIN_FRACTION = 1 / 65536
#: The longest time that a sweep may be old, which is a day.
_MAX_AGE_S = 86400


@dataclasses.dataclass(frozen=True)
class Harvest:
    """Result of a harvest: the young pages, and the cost of finding and of re-arming them."""

    young: YoungBitmap
    harvest_ns: int
    rearm_ns: int

    @property
    def n_young(self) -> int:
        """Number of young pages."""
        return self.young.count()


@dataclasses.dataclass(frozen=True, eq=False)
class HarvestRequest:
    """Arguments of a harvest, as :meth:`Harvestable.harvest` documents them; checked.

    What depends on the VM is not checked here: whether the range is in its memory, and
    whether it has the tracker.

    :raises LayoutError: if an argument is wrong; names it
    """

    gfn_start: int = 0
    n_pages: int | None = None
    _: dataclasses.KW_ONLY
    tracker: str = "auto"
    clear: bool = True
    rearm: Rearm = "young"
    fraction: float | None = None
    mask: Words | None = None
    table_format: TableFormat | None = None
    view: str = DEFAULT_VIEW
    max_age_s: float = 0.0
    force: bool = False

    def __post_init__(self) -> None:
        check_gfns(self.gfn_start, self.n_pages)
        check_name("rearm", self.rearm, REARM, "rearm")
        if self.fraction is not None:
            self._check_fraction(self.fraction)
        if self.table_format is not None:
            check_name("table format", self.table_format, TABLE_FORMATS, "table_format")
        if self.n_pages is not None:
            check_mask(self.mask, self.n_pages)
        check_view(self.view)
        if not 0 <= self.max_age_s <= _MAX_AGE_S:
            raise LayoutError(
                f"harvest: an age of {self.max_age_s:g} s: need 0 to {_MAX_AGE_S}",
                field="max_age_s",
            )

    def _check_fraction(self, fraction: float) -> None:
        if self.rearm != "sample":
            raise LayoutError(
                f'a fraction goes with rearm="sample", not {self.rearm!r}', field="fraction"
            )
        if not MIN_FRACTION <= fraction <= 1:
            raise LayoutError(
                f"a fraction of {fraction:g}: need one from 1/{1 / MIN_FRACTION:.0f} to 1",
                field="fraction",
            )

    def within(self, gfn_end: int) -> HarvestRequest:
        """Return the request for a VM: without ``n_pages``, to the end of its memory.

        :param gfn_end: the first gfn above all memory
        :raises LayoutError: if the range ends beyond it, or the mask has another size
        """
        _, n_pages = range_within(self.gfn_start, self.n_pages, gfn_end)
        return self if n_pages == self.n_pages else dataclasses.replace(self, n_pages=n_pages)

    @property
    def count(self) -> int:
        """Number of pages, of a request that :meth:`within` returned."""
        if self.n_pages is None:
            raise TypeError("the number of pages is not known before within()")
        return self.n_pages


class Harvestable(abc.ABC):
    """A VM, a client of one, or a process, that can be harvested."""

    def harvest(
        self,
        gfn_start: int = 0,
        n_pages: int | None = None,
        *,
        tracker: str = "auto",
        clear: bool = True,
        rearm: Rearm = "young",
        fraction: float | None = None,
        mask: Words | None = None,
        table_format: TableFormat | None = None,
        view: str = DEFAULT_VIEW,
        max_age_s: float = 0.0,
        force: bool = False,
    ) -> Harvest:
        """Return the young pages of a range; concurrent calls wait.

        :param n_pages: None: to the end of memory
        :param tracker: ``auto`` keeps the one in use: a change begins a new window
        :param clear: begin a new window for the young pages
        :param rearm: ``none``; ``young``, the pages that this cleared; ``all`` of the range;
            ``sample``, clear and re-arm a ``fraction`` only, other pages at each harvest: the
            guest pays less, and a page that is no longer touched reads as young for
            ``1 / fraction`` harvests
        :param fraction: with ``sample``, from 1/65536 to 1; None: a default that was measured
        :param mask: shape ``(ceil(n_pages / 64),)``, ``uint64``: clear only where the bit is 1
        :param table_format: feed the harvest into a model table of this format and return
            what its walker finds; None: what the tracker finds
        :param view: the reader's own window: what became young since the last harvest of this
            view, whatever other readers do. The first harvest of a name begins the window and
            returns nothing. The default one is shared by all who name none
        :param max_age_s: the window may end with the sweep of another reader that is not older,
            which saves the guest a sweep; 0: it ends now
        :param force: change the tracker also while others read by the present one. It is put
            back when the view ends, unless that is the default one
        :raises InUseError: if others read by another tracker, or there are too many views
        :raises CapabilityError: if the tracker does not work here
        :raises LayoutError: if an argument is wrong; then the tracker in use and its state
            do not change
        """
        return self.run_harvest(
            HarvestRequest(
                gfn_start,
                n_pages,
                tracker=tracker,
                clear=clear,
                rearm=rearm,
                fraction=fraction,
                mask=mask,
                table_format=table_format,
                view=view,
                max_age_s=max_age_s,
                force=force,
            )
        )

    @abc.abstractmethod
    def run_harvest(self, asked: HarvestRequest) -> Harvest:
        """Do what :meth:`harvest` documents, with checked arguments."""
