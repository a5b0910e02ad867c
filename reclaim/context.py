"""State shared by all VMs of a daemon: options, pressure, limits, decisions."""

from __future__ import annotations

import dataclasses
import os

from kvmhost.reclaim.account.decisions import Decisions
from kvmhost.reclaim.host import Host
from kvmhost.reclaim.pressure.limits import CpuShare, Rate
from kvmhost.reclaim.settings.options import Config, Limits, VmOptions
from kvmhost.units import PAGE_BYTES

__all__ = ["DaemonContext", "cpu_limit", "rate_limit"]


@dataclasses.dataclass
class DaemonContext:
    """Context of one daemon. A reload replaces its parts; sessions read them each pass.

    :param socket: path of the daemon's own socket; empty if it has none
    """

    config: Config
    host: Host
    decisions: Decisions
    rate: Rate
    cpu: CpuShare
    socket: str = ""

    @classmethod
    def of(cls, config: Config, host: Host | None = None, socket: str = "") -> DaemonContext:
        """Create all parts from the options.

        :raises ReclaimError: if a file that the options name cannot be used
        """
        account = config.account
        return cls(
            config=config,
            host=host or Host(config.pressure),
            decisions=Decisions(account.decisions, account.decisions_file),
            rate=rate_limit(config.limits),
            cpu=cpu_limit(config.limits),
            socket=socket,
        )

    @property
    def holder(self) -> str:
        """The name of this daemon in the leases of its VMs."""
        return f"reclaimd {self.config.daemon.name or f'pid-{os.getpid()}'}"

    @property
    def lease_s(self) -> float:
        """Time after which a VM may consider a silent daemon hung."""
        daemon = self.config.daemon
        return float(max(0.05, daemon.lease, 3 * daemon.interval))

    def options_of(self, vm: str) -> VmOptions:
        """Return the options of one VM, given by name or by the path of its socket."""
        name = os.path.basename(vm).removesuffix(".sock") if "/" in vm else vm  # noqa: PTH119
        return self.config.of_vm(name)

    def close(self) -> None:
        """Close files. Idempotent."""
        self.host.close()
        self.decisions.close()


def rate_limit(limits: Limits) -> Rate:
    """Return the smaller of the page and byte rate limits, in pages."""
    rates = [limits.pages_per_s, limits.bytes_per_s / PAGE_BYTES]
    return Rate(min((rate for rate in rates if rate), default=0))


def cpu_limit(limits: Limits) -> CpuShare:
    """Return the limit on processor time."""
    return CpuShare(limits.cpu)
