"""Pressure common to all VMs of a daemon: stall, trigger, cgroup, a shared budget.

The daemon's loop calls :meth:`Host.update` once per interval, and at once when the
trigger fires. The VMs' threads report their pages (:meth:`Host.claim`) and fetch the
pages to evict (:meth:`Host.demand`) and to keep (:meth:`Host.budget_pages`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from kvmhost.closing import Closing
from kvmhost.errors import CapabilityError
from kvmhost.reclaim.account.decisions import EvictReason
from kvmhost.reclaim.errors import ReclaimError
from kvmhost.reclaim.pressure.cgroup import CgroupLimit, MemoryCgroup
from kvmhost.reclaim.pressure.controllers import Demand
from kvmhost.reclaim.pressure.kernelfiles import KernelFiles
from kvmhost.reclaim.pressure.psi import SYSTEM_PSI, PsiMeter, PsiTrigger
from kvmhost.reclaim.pressure.shares import Claim, share_budget, share_demand
from kvmhost.reclaim.settings.options import PressureOptions
from kvmhost.units import PAGE_BYTES

__all__ = ["Host"]


log = logging.getLogger("reclaim")


class Host(Closing):
    """Pressure on the host, and the demands that follow from it. Thread-safe.

    :param trigger: creates the trigger from its text and path; None disables it
    :raises ReclaimError: if a file that the options name cannot be used
    :raises CapabilityError: if the cgroup has no memory controller, or neither it nor a cgroup
        above it has a limit
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
        self._demands: dict[str, Demand] = {}
        self._parts: dict[str, int] = {}
        self.problem = ""
        #: Share of time stalled in the last interval; None if not measured.
        self.stall: float | None = None
        self.trigger_fired = 0
        #: Usage, limit and path of the cgroup with the tightest limit.
        self.cgroup_bytes = self.cgroup_limit_bytes = 0
        self._cgroup_path = options.cgroup
        path = SYSTEM_PSI if options.psi in ("system", "vm") else options.psi
        wanted = options.psi != "vm" and (options.psi_target > 0 or options.psi != "system")
        self._meter = PsiMeter(path, files, clock) if wanted else None
        self._cgroup = MemoryCgroup.at(options.cgroup, files) if options.cgroup else None
        if self._cgroup is not None:
            self._tightest(self._cgroup, options.cgroup_high)
        self.trigger: PsiTrigger | None = None
        if options.psi_trigger and trigger is not None:
            self.trigger = trigger(options.psi_trigger, path)

    def trigger_counts(self) -> bool:
        """Return whether the trigger's event is about stall since it was armed."""
        try:
            return self.trigger is not None and self.trigger.counts()
        except ReclaimError as error:
            log.warning("pressure: %s", error)
            return False

    def update(self, fired: bool = False) -> None:
        """Read the pressure files and distribute the pages to evict over the VMs.

        A file that can no longer be read is logged once; everything else continues.

        :param fired: the trigger fired
        """
        try:
            if self._meter is not None:
                self.stall = self._meter.share()
            excess = self._cgroup_excess()
            self.problem = ""
        except (ReclaimError, CapabilityError) as error:
            excess = 0
            if str(error) != self.problem:
                log.warning("pressure: %s", error)
            self.problem = str(error)
        with self._lock:
            if fired:
                self.trigger_fired += 1
                total = sum(claim.resident for claim in self._claims.values())
                step = self.options.trigger_step
                text = f"the kernel reported a stall of {self.options.psi_trigger}: "
                text += f"evicting {step:.0%}"
                self._share_out(int(total * step), EvictReason.TRIGGER, text)
            if excess:
                high = self.options.cgroup_high * self.cgroup_limit_bytes
                text = f"{self._cgroup_path} is at {self.cgroup_bytes >> 20} MiB, above "
                text += f"{high / 2**20:.0f} MiB"
                self._share_out(excess, EvictReason.CGROUP, text)
            if self.options.total_budget:
                total = self.options.total_budget // PAGE_BYTES
                self._parts = share_budget(total, self._claims)

    def _cgroup_excess(self) -> int:
        """Return the pages above the mark of the tightest limit, and remember that limit."""
        if self._cgroup is None:
            return 0
        share = self.options.cgroup_high
        tightest = self._tightest(self._cgroup, share)
        self.cgroup_bytes, self.cgroup_limit_bytes = tightest.needed_bytes, tightest.limit_bytes
        self._cgroup_path = tightest.path
        excess = tightest.excess_bytes(share)
        return max(0, -(-excess // PAGE_BYTES))

    @staticmethod
    def _tightest(cgroup: MemoryCgroup, share: float) -> CgroupLimit:
        tightest = cgroup.tightest(share)
        if tightest is None:
            raise CapabilityError(
                f"cgroup {cgroup.path}",
                "a memory limit, its own or of a cgroup above it",
                "none",
                "set memory.max (version 1: memory.limit_in_bytes), or name another cgroup",
            )
        return tightest

    def _share_out(self, pages: int, why: EvictReason, text: str) -> None:
        for vm, part in share_demand(pages, self._claims).items():
            before = self._demands.get(vm)
            # A demand that was not met yet is found again by the next update.
            if part and (before is None or part > before.pages):
                self._demands[vm] = Demand(part, part, why, text)

    def claim(self, vm: str, claim: Claim) -> None:
        """Store the pages that a VM has and needs."""
        with self._lock:
            self._claims[vm] = claim

    def demand(self, vm: str) -> Demand | None:
        """Return the demand on a VM, and clear it."""
        with self._lock:
            return self._demands.pop(vm, None)

    def budget_pages(self, vm: str) -> int | None:
        """Return a VM's part of the shared budget; None if there is none yet."""
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
