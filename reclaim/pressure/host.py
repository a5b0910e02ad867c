"""What all VMs of a daemon heed together: stall, trigger, cgroup, a shared budget.

The daemon's loop calls :meth:`Host.look` once an interval, and at once when the trigger
fires; the VMs' threads report what they have (:meth:`Host.claim`) and fetch what they
should give (:meth:`Host.demand`) and may have (:meth:`Host.budget_pages`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from kvmhost.closing import Closing
from kvmhost.reclaim.account.decisions import Why
from kvmhost.reclaim.errors import ReclaimError
from kvmhost.reclaim.pressure.cgroup import MemoryCgroup
from kvmhost.reclaim.pressure.controllers import Want
from kvmhost.reclaim.pressure.kernelfiles import KernelFiles
from kvmhost.reclaim.pressure.psi import SYSTEM_PSI, PsiMeter, PsiTrigger
from kvmhost.reclaim.pressure.shares import Claim, share_budget, share_demand
from kvmhost.reclaim.settings.options import PressureOptions

__all__ = ["Host"]

_PAGE_BYTES = 4096

log = logging.getLogger("reclaim")


class Host(Closing):
    """Pressure on the host, and what follows for each VM. Safe for several threads.

    :param trigger: makes the trigger of a text and a path; None: none is set
    :raises ReclaimError: if a file that the options name cannot be used
    :raises CapabilityError: if the cgroup has no memory controller
    """

    def __init__(
        self,
        options: PressureOptions,
        files: KernelFiles | None = None,
        clock: Callable[[], float] = time.monotonic,
        trigger: Callable[[str, str], PsiTrigger] | None = PsiTrigger,
    ) -> None:
        self.options = options
        self._lock = threading.Lock()
        self._claims: dict[str, Claim] = {}
        self._demands: dict[str, Want] = {}
        self._parts: dict[str, int] = {}
        self.problem = ""
        #: Share of time stalled in the last interval; None: not measured.
        self.stall: float | None = None
        self.trigger_fired = 0
        self.cgroup_bytes = self.cgroup_limit_bytes = 0
        path = SYSTEM_PSI if options.psi in ("system", "vm") else options.psi
        wanted = options.psi != "vm" and (options.psi_target > 0 or options.psi != "system")
        self._meter = PsiMeter(path, files, clock) if wanted else None
        self._cgroup = MemoryCgroup.at(options.cgroup, files) if options.cgroup else None
        self.trigger: PsiTrigger | None = None
        if options.psi_trigger and trigger is not None:
            self.trigger = trigger(options.psi_trigger, path)

    def look(self, fired: bool = False) -> None:
        """Read the files and share out what they demand.

        A file that cannot be read any more is said once, and the rest goes on.

        :param fired: the trigger did
        """
        try:
            if self._meter is not None:
                self.stall = self._meter.share()
            excess = self._cgroup_excess()
            self.problem = ""
        except ReclaimError as error:
            excess = 0
            if str(error) != self.problem:
                log.warning("pressure: %s", error)
            self.problem = str(error)
        with self._lock:
            if fired:
                self.trigger_fired += 1
                total = sum(claim.resident for claim in self._claims.values())
                step = self.options.trigger_step
                text = f"the kernel reported a stall of {self.options.psi_trigger}: {step:.0%} go"
                self._share_out(int(total * step), Why.TRIGGER, text)
            if excess:
                high = self.options.cgroup_high * self.cgroup_limit_bytes
                text = f"{self.options.cgroup} is at {self.cgroup_bytes >> 20} MiB, above "
                text += f"{high / 2**20:.0f} MiB"
                self._share_out(excess, Why.CGROUP, text)
            if self.options.total_budget:
                total = self.options.total_budget // _PAGE_BYTES
                self._parts = share_budget(total, self._claims)

    def _cgroup_excess(self) -> int:
        if self._cgroup is None:
            return 0
        limit = self._cgroup.limit_bytes()
        self.cgroup_bytes, self.cgroup_limit_bytes = self._cgroup.needed_bytes(), limit or 0
        if limit is None:
            return 0
        excess = self.cgroup_bytes - int(limit * self.options.cgroup_high)
        return max(0, -(-excess // _PAGE_BYTES))

    def _share_out(self, pages: int, why: Why, text: str) -> None:
        for vm, part in share_demand(pages, self._claims).items():
            before = self._demands.get(vm)
            # What one look found, the next one finds again unless it was followed.
            if part and (before is None or part > before.pages):
                self._demands[vm] = Want(part, part, why, text)

    def claim(self, vm: str, claim: Claim) -> None:
        """Take note of what a VM has and needs."""
        with self._lock:
            self._claims[vm] = claim

    def demand(self, vm: str) -> Want | None:
        """Return what a VM should give, once."""
        with self._lock:
            return self._demands.pop(vm, None)

    def budget_pages(self, vm: str) -> int | None:
        """Return a VM's part of the shared budget; None: there is none, or not yet."""
        with self._lock:
            return self._parts.get(vm)

    def forget(self, vm: str) -> None:
        """Drop everything about a VM."""
        with self._lock:
            for known in (self._claims, self._demands, self._parts):
                known.pop(vm, None)

    def close(self) -> None:
        """Remove the trigger. Idempotent."""
        if self.trigger is not None:
            self.trigger.close()
            self.trigger = None
