"""The table of docs/kvm-api.md: every ioctl of linux/kvm.h for x86, and where it is.

Nothing in it is written by hand but the reasons for what is left out: wrappers are
read out of the source of ``kvmhost/kvm``, tests out of the markers of the tests
beside this file. ``python tests/kvm/bindings/api_table.py`` writes the table anew.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "docs" / "kvm-api.md"
HEADERS = [
    Path("/usr/include/linux/kvm.h"),
    *Path("/usr/include").glob("*/asm/kvm.h"),
]
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"

_ASSIGNMENT = "legacy device assignment, removed in Linux 4.12; VFIO instead"
#: Requests that are not wrapped, and why.
LEFT_OUT = {
    "KVM_TRACE_ENABLE": "removed; tracepoints instead",
    "KVM_TRACE_PAUSE": "removed; tracepoints instead",
    "KVM_TRACE_DISABLE": "removed; tracepoints instead",
    "KVM_SET_MEMORY_REGION": "removed; KVM_SET_USER_MEMORY_REGION instead",
    "KVM_SET_MEMORY_ALIAS": "removed; two slots on the same memory instead",
    "KVM_DEBUG_GUEST": "removed; KVM_SET_GUEST_DEBUG instead",
    "KVM_ASSIGN_PCI_DEVICE": _ASSIGNMENT,
    "KVM_ASSIGN_IRQ": _ASSIGNMENT,
    "KVM_ASSIGN_DEV_IRQ": _ASSIGNMENT,
    "KVM_DEASSIGN_PCI_DEVICE": _ASSIGNMENT,
    "KVM_ASSIGN_SET_MSIX_NR": _ASSIGNMENT,
    "KVM_ASSIGN_SET_MSIX_ENTRY": _ASSIGNMENT,
    "KVM_ASSIGN_SET_INTX_MASK": _ASSIGNMENT,
    "KVM_DEASSIGN_DEV_IRQ": _ASSIGNMENT,
}

#: Capabilities that the development machine lacks: tests that need them are skipped there.
ABSENT_HERE = {
    "HYPERV_EVENTFD",
    "MEMORY_ATTRIBUTES",
    "NESTED_STATE",
    "PRE_FAULT_MEMORY",
    "SYS_HYPERV_CPUID",
    "TSC_CONTROL",
    "VM_TSC_CONTROL",
    "X86_SMM",
    "XEN_HVM",
}

#: Requests of other architectures, by the beginning of their names or by name.
OTHER = re.compile(r"KVM_(S390|PPC|ARM|RISCV|LOONGARCH)_")
OTHER_NAMES = {
    "KVM_ALLOCATE_RMA": "powerpc",
    "KVM_CREATE_SPAPR_TCE": "powerpc",
    "KVM_CREATE_SPAPR_TCE_64": "powerpc",
    "KVM_DIRTY_TLB": "powerpc",
}

#: Where arm64 does it otherwise.
ARM64 = {
    "KVM_CREATE_VM": "the type is the size of a guest physical address in bits",
    "KVM_CREATE_IRQCHIP": "GICv2 only; a GICv3 is a device (KVM_CREATE_DEVICE)",
    "KVM_CREATE_VCPU": "then KVM_ARM_VCPU_INIT, with KVM_ARM_PREFERRED_TARGET",
    "KVM_GET_ONE_REG": "every register of the vCPU, by the ids of KVM_GET_REG_LIST",
    "KVM_GET_REGS": "missing: KVM_GET_ONE_REG instead (so too sregs, FPU, XSAVE, debug registers)",
    "KVM_IRQ_LINE": "codes kind, vCPU and number into the GSI",
    "KVM_SIGNAL_MSI": "with a device id, for the ITS",
    "KVM_SET_GUEST_DEBUG": "other debug registers, and more of them",
    "KVM_ARM_VCPU_INIT": "arm64 only: the processor's kind and features",
    "KVM_ARM_PREFERRED_TARGET": "arm64 only: the kind that the host can run",
    "KVM_ARM_VCPU_FINALIZE": "arm64 only: closes the configuration of SVE",
    "KVM_ARM_SET_DEVICE_ADDR": "arm64 only: where a GICv2 is",
    "KVM_ARM_MTE_COPY_TAGS": "arm64 only: memory tags of guest pages",
    "KVM_GET_VCPU_EVENTS": "a pending SError, and whether it has a syndrome",
    "KVM_SET_DEVICE_ATTR": "on vCPUs: PMU, timers, stolen time; on the VM: SMCCC filter",
    "KVM_GET_MP_STATE": "runnable, stopped, suspended (PSCI)",
    "KVM_GET_CLOCK": "missing; the counter offset is KVM_ARM_SET_COUNTER_OFFSET",
    "KVM_GET_MSRS": "missing; system registers are KVM_GET_ONE_REG",
    "KVM_SET_CPUID2": "missing; id registers are KVM_SET_ONE_REG",
}


@dataclasses.dataclass
class Row:
    """One request: its wrappers, and the tests that name it with the capabilities they need."""

    name: str
    wrappers: list[str] = dataclasses.field(default_factory=list)
    tests: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    refusals: dict[str, set[str]] = dataclasses.field(default_factory=dict)

    def here(self) -> str:
        """Say what can be shown on the development machine."""
        if any(not caps & ABSENT_HERE for caps in self.tests.values()):
            return "yes"
        missing = sorted(set().union(*self.tests.values()) & ABSENT_HERE)
        why = "".join(f"; KVM_CAP_{cap} is missing" for cap in missing)
        return ("refusal only" if self.refusals else "skipped") + why


def header_ioctls() -> set[str]:
    """Return the names of all ioctls in the installed headers."""
    text = "\n".join(path.read_text() for path in HEADERS if path.exists())
    found = re.findall(r"^#define[ \t]+(KVM_\w+)[ \t]+(?:\\\n[ \t]*)?_IO[WR]*\(", text, re.M)
    aliases = re.findall(r"^#define[ \t]+(KVM_\w+)[ \t]+__KVM_DEPRECATED_", text, re.M)
    return {*found, *aliases}


def rows() -> dict[str, Row]:
    """Return all wrapped requests, in the order of their names."""
    found: dict[str, Row] = {}
    for cls, method, names in _wrappers():
        for name in names:
            row = found.setdefault(name, Row(name))
            row.wrappers.append(f"{cls}.{method}" if cls else method)
    for test, covered, refused, caps in _tests():
        for name in covered:
            found.setdefault(name, Row(name)).tests[test] = caps
        for name in refused:
            found.setdefault(name, Row(name)).refusals[test] = caps
    return dict(sorted(found.items()))


def table() -> str:
    """Return the tables in Markdown."""
    lines = ["| request | wrapped as | tested by (needs) | tested here |", "|---|---|---|---|"]
    for row in rows().values():
        tests = ", ".join(map(_shown, row.tests.items())) or ", ".join(row.refusals)
        wrappers = ", ".join(f"`{name}`" for name in dict.fromkeys(row.wrappers))
        lines.append(f"| `{row.name}` | {wrappers} | {tests} | {row.here()} |")
    lines += ["", "Left out:", "", "| request | why |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, why in sorted(LEFT_OUT.items())]
    lines += ["", "On arm64 (not built here):", "", "| request | differs |", "|---|---|"]
    lines += [f"| `{name}` | {how} |" for name, how in sorted(ARM64.items())]
    return "\n".join(lines) + "\n"


def _shown(test: tuple[str, set[str]]) -> str:
    name, caps = test
    return f"{name} ({', '.join(sorted(caps))})" if caps else name


def _wrappers() -> Iterator[tuple[str, str, set[str]]]:
    """Yield class, method and requests. A request is a string, or ``lib.KVM_…`` for ioctls."""
    for path in sorted((ROOT / "kvmhost" / "kvm").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef):
                continue
            cls = _PUBLIC.get(node.name, node.name)
            methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
            private = {m.name: _requests(m) for m in methods if m.name.startswith("_")}
            for method in methods:
                if not method.name.startswith("_"):
                    inner = [private.get(name, set()) for name in _called(method)]
                    yield cls, method.name, _requests(method).union(*inner)


def _called(method: ast.FunctionDef) -> set[str]:
    calls = [node.func for node in ast.walk(method) if isinstance(node, ast.Call)]
    return {call.attr for call in calls if isinstance(call, ast.Attribute)}


def _requests(method: ast.FunctionDef) -> set[str]:
    called = [node for node in ast.walk(method) if isinstance(node, ast.Call)]
    texts = [
        leaf.value
        for call in called
        for leaf in (*call.args, *(keyword.value for keyword in call.keywords))
        if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)
    ]
    assigned = [
        node.value.value
        for node in ast.walk(method)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    ]
    names = [text for text in [*texts, *assigned] if isinstance(text, str)]
    return {name for name in names if re.fullmatch(r"KVM_(?!CAP_)[A-Z0-9_]+", name)}


#: Classes that are parts of the public ones.
_PUBLIC = {
    "VmMemory": "KvmVm",
    "VmInterrupts": "KvmVm",
    "VmEvents": "KvmVm",
    "VmXen": "KvmVm",
    "VcpuXen": "KvmVcpu",
    "VcpuState": "KvmVcpu",
    "_Registers": "KvmVcpu",
    "_Floating": "KvmVcpu",
    "_Identity": "KvmVcpu",
    "_Events": "KvmVcpu",
    "Capabilities": "System and KvmVm",
    "Enabling": "KvmVm and KvmVcpu",
    "Attributes": "System, KvmVm, KvmVcpu and Device",
}


def _tests() -> Iterator[tuple[str, set[str], set[str], set[str]]]:
    """Yield test, requests covered, requests refused, capabilities needed."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marked = {"covers": set[str](), "refused": set[str](), "requires_cap": set[str]()}
                for decorator in node.decorator_list:
                    name, words = _marker(decorator)
                    if name in marked:
                        marked[name] |= words
                name = f"{path.stem.removeprefix('test_')}::{node.name.removeprefix('test_')}"
                yield name, marked["covers"], marked["refused"], marked["requires_cap"]


def _marker(decorator: ast.expr) -> tuple[str, set[str]]:
    if not isinstance(decorator, ast.Call) or not isinstance(decorator.func, ast.Attribute):
        return "", set()
    words = {str(arg.value) for arg in decorator.args if isinstance(arg, ast.Constant)}
    return decorator.func.attr, words


def main() -> int:
    """Put the tables into the document."""
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.split(END)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
