"""A VM from nothing: /dev/kvm, memory, one vCPU, and a few bytes of code.

Uses kvmhost.kvm alone. The guest is 16-bit code that adds two registers, prints the sum
as a digit on port 0x3f8, and halts:

    $ python first_program.py
    port 0x3f8: 5
    halted after 2 exits, rax = 0xa35
"""

from __future__ import annotations

import mmap

from kvmhost.exits import Hlt, IoOut
from kvmhost.kvm import System

GPA = 0x1000

CODE = bytes.fromhex(
    "ba f8 03"  # mov $0x3f8, %dx
    "00 d8"  # add %bl, %al
    "04 30"  # add $'0', %al
    "ee"  # out %al, (%dx)
    "b4 0a"  # mov $10, %ah
    "f4"  # hlt
)


def main() -> None:
    """Run the guest and print what it does."""
    memory = mmap.mmap(-1, mmap.PAGESIZE)  # any writable buffer that begins at a page
    memory[: len(CODE)] = CODE
    with System() as kvm, kvm.create_vm() as vm:
        vm.set_memory_region(0, GPA, len(memory), memory)
        with vm.create_vcpu(0) as vcpu:
            sregs = vcpu.get_sregs()
            sregs.cs.update(base=0, selector=0)
            vcpu.set_sregs(sregs)
            vcpu.set_regs({"rip": GPA, "rax": 2, "rbx": 3, "rflags": 2})
            for exits in range(1, 100):
                match vcpu.run():
                    case IoOut(port=port, data=data):
                        print(f"port {port:#x}: {data.decode()}")
                    case Hlt():
                        print(f"halted after {exits} exits, rax = {vcpu.get_regs().rax:#x}")
                        return
                    case other:
                        raise SystemExit(f"unexpected exit: {other}")


if __name__ == "__main__":
    main()
