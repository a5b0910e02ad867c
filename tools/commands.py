"""The commands of ``kvmhost``: names, modules, and one-line descriptions."""

from __future__ import annotations

__all__ = ["COMMANDS"]

#: Module in this package and one-line description, by command.
COMMANDS = {
    "doctor": ("doctor", "what works on this host and what does not, with the remedy"),
    "guests": ("guests", "list the built-in guests and their parameters, or build one of your own"),
    "run": ("run", "boot a guest and pass its exit status through"),
    "list": ("list", "the VMs that run here, and what each of them does"),
    "top": ("top", "a live table of the VMs that run here"),
    "pause": ("pause", "hold the vCPUs of a VM"),
    "resume": ("resume", "undo a pause of a VM"),
    "stop": ("stop", "end VMs, and wait until they have ended"),
    "snapshot": ("snapshot", "write a running VM into a file, for run --restore"),
    "young": ("young", "look at young bitmaps of a running VM"),
    "reclaimd": ("reclaimd", "keep VMs under a memory budget by evicting cold pages"),
    "drain": ("drain", "bring every evicted page of a VM back, and lift its limit"),
    "limit": ("limit", "limit the resident memory of a running VM, and shrink it now"),
    "page": ("page", "all that is known of one page, and why it was taken or not"),
    "lru_gen": ("lru_gen", "show generations, age and evict, as the kernel's file does"),
    "demo": ("demo", "the whole path: boot, harvest, reclaim under a limit, look"),
    "accuracy": ("accuracy", "how accurate and how expensive each tracker is"),
    "stress": ("stress", "fill page tables, change memory under running vCPUs, check every write"),
    "bench": ("bench", "measure walks, exits, harvests and starts, as ratios in one run"),
    "lab": ("lab", "emulated hosts with a KVM of their own, on other kernels and processors"),
    "docs": ("docs", "read the documentation that is installed"),
    "completion": ("completion", "print a completion script for a shell"),
    "man": ("man", "show a manual page, or write all of them"),
}
