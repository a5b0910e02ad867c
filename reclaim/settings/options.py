"""The daemon's options: name, type, default and one-line description of each.

Each option is a key in the configuration file, in the section of its class, and a
command-line flag: ``interval`` is ``--interval``. :mod:`kvmhost.reclaim.settings.config`
reads both.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from kvmhost.units import Bytes, Mark, MaxShare, Seconds, Share

__all__ = ["Account", "Config", "DaemonOptions", "Limits", "PressureOptions", "VmOptions"]


def _about(text: str, **bounds: Any) -> msgspec.Meta:
    return msgspec.Meta(description=text, **bounds)


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all sections."""


class DaemonOptions(_Section, frozen=True):
    """Section ``[daemon]``: the process itself."""

    vms: Annotated[
        list[str], _about("names of VMs, paths of their sockets, or patterns such as 'web*'")
    ] = []
    name: Annotated[
        str, _about("name of the daemon's own socket; empty: pid-N", pattern=r"^[A-Za-z0-9_.-]*$")
    ] = ""
    interval: Annotated[Seconds, _about("time between two passes over a VM")] = Seconds(1)
    lease: Annotated[
        Seconds,
        _about(
            "a VM considers the daemon hung after this time without a request; at least 3 intervals"
        ),
    ] = Seconds(10)
    wait: Annotated[bool, _about("wait for named VMs that do not run yet")] = False
    take_over: Annotated[bool, _about("take VMs over from another daemon")] = False
    dry_run: Annotated[
        bool, _about("harvest, decide and report, but set no limit and evict nothing")
    ] = False
    passes: Annotated[
        int, _about("exit after this many passes over each VM; 0: never", ge=0, lt=1 << 52)
    ] = 0
    json: Annotated[bool, _about("write the log as one JSON object per line")] = False
    log_file: Annotated[
        str,
        _about(
            "append the log to this file; empty: standard output, unless a table is shown there"
        ),
    ] = ""
    metrics_port: Annotated[
        int, _about("also serve metrics on this TCP port of 127.0.0.1; 0: off", ge=0, lt=65536)
    ] = 0


class PressureOptions(_Section, frozen=True):
    """Section ``[pressure]``: pressure and limits that apply to all VMs together."""

    total_budget: Annotated[
        Bytes, _about("resident memory of all VMs, divided by weight and coldness; 0: off")
    ] = Bytes(0)
    psi: Annotated[
        str,
        _about(
            "source of stall times: system, vm (time in fault handlers), or the path of a "
            "memory.pressure file",
            min_length=1,
        ),
    ] = "system"
    psi_target: Annotated[
        Share, _about("evict ahead of need until tasks stall for this share of time; 0%: off")
    ] = Share(0)
    proactive_step: Annotated[
        Share,
        _about("largest share of resident memory evicted ahead of need per minute"),
    ] = Share(0.06)
    psi_trigger: Annotated[
        str,
        _about(
            "evict at once when the kernel reports 'some STALL in WINDOW', for example "
            "'some 150ms in 2s'; empty: off"
        ),
    ] = ""
    trigger_step: Annotated[
        Share, _about("share of resident memory evicted when the trigger fires")
    ] = Share(0.05)
    cgroup: Annotated[
        str, _about("path of a memory cgroup, version 1 or 2, to keep below its limit; empty: off")
    ] = ""
    cgroup_high: Annotated[Share, _about("evict above this share of the cgroup's limit")] = Share(
        0.9
    )
    promotion_target: Annotated[
        Share,
        _about(
            "evict ahead of need until this share of the working set refaults per minute; 0%: off"
        ),
    ] = Share(0)
    backoff: Annotated[
        Share,
        _about("hold back when more than this share of the evicted pages refaults; 0%: never"),
    ] = Share(0.2)


class Limits(_Section, frozen=True):
    """Section ``[limits]``: resource limits of the daemon, over all VMs."""

    pages_per_s: Annotated[
        int, _about("pages evicted per second; 0: no limit", ge=0, lt=1 << 40)
    ] = 0
    bytes_per_s: Annotated[Bytes, _about("the same in bytes; 0: no limit")] = Bytes(0)
    cpu: Annotated[Share, _about("processor time, 100% is one core; 0%: no limit")] = Share(0)


class Account(_Section, frozen=True):
    """Section ``[account]``: the history of decisions and pages that is kept."""

    decisions: Annotated[int, _about("decisions kept in memory", ge=1, le=1 << 20)] = 4096
    decisions_file: Annotated[
        str, _about("also append each decision, as a JSON line, to this file; empty: off")
    ] = ""
    page_history: Annotated[
        bool, _about("keep 14 bytes of history per guest page, for kvmhost page")
    ] = True


class VmOptions(_Section, frozen=True):
    """Section ``[defaults]``, and tables ``[vm.PATTERN]``: how one VM is managed."""

    budget: Annotated[
        Mark,
        _about(
            "resident memory that the VM never exceeds, as a size or a share of its memory; "
            "0: only [pressure] applies"
        ),
    ] = Mark(size=Bytes(0))
    high: Annotated[
        Mark, _about("evict in the background above this size or share of the budget")
    ] = Mark(share=Share(0.95))
    low: Annotated[Mark, _about("and down to this size or share")] = Mark(share=Share(0.85))
    weight: Annotated[
        float, _about("share of shared memory, relative to other VMs", gt=0, le=1000)
    ] = 1.0
    tracker: Annotated[
        str,
        _about("source of young bits: auto (the VM's choice), or one that kvmhost doctor lists"),
    ] = "auto"
    view: Annotated[
        str,
        _about(
            "name under which the VM is read: a reader has a window of its own",
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$",
        ),
    ] = "reclaimd"
    max_loss: Annotated[
        MaxShare,
        _about(
            "share of its vCPUs' time that the VM may lose to re-arming: harvests clear fewer of "
            "the pages that are always in use, then come less often; off: no bound"
        ),
    ] = MaxShare(0.03)
    fraction: Annotated[
        Share,
        _about(
            "clear and re-arm at most this share of the pages at each harvest, in rotation; with "
            "1/8, a page takes 8 passes to look old"
        ),
    ] = Share(1)
    policy: Annotated[
        str, _about("which pages are evicted: lru_gen, or the name of another policy")
    ] = "lru_gen"
    policy_options: Annotated[
        dict[str, bool | int | float | str], _about("further options of that policy, by name")
    ] = {}
    generations: Annotated[
        int,
        _about("generations to keep apart; the two youngest are never evicted", ge=4, le=64),
    ] = 4
    seed: Annotated[
        int, _about("shuffle pages of one generation, by this seed; -1: by gfn", ge=-1, lt=1 << 62)
    ] = -1
    max_victims: Annotated[
        int, _about("length of the list of pages to evict next", ge=0, le=1 << 24)
    ] = 16384


class Config(_Section, frozen=True):
    """All sections."""

    daemon: DaemonOptions = DaemonOptions()
    pressure: PressureOptions = PressureOptions()
    limits: Limits = Limits()
    account: Account = Account()
    defaults: VmOptions = VmOptions()
    #: Options by VM name pattern, in the order of the file; each value contains all options.
    vm: dict[str, VmOptions] = {}

    def of_vm(self, name: str) -> VmOptions:
        """Return the options of a VM: those of the first matching pattern, else the defaults."""
        import fnmatch

        for pattern, options in self.vm.items():
            if fnmatch.fnmatchcase(name, pattern):
                return options
        return self.defaults
