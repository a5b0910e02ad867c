"""A device of your own on the bus of a machine, and a function that takes any VM.

The guest is 16-bit code that writes 7 to a port, reads the port, and exits with what it read.
The device at that port gives back twice what was written:

    $ python own_device.py
    registers at the start: rip=0x7c00
    running: False, paused: False, resident: 3 pages or more
    the device got [7]; the guest exited with status 29, (14 << 1) | 1
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from kvmhost.boot.image import Image
from kvmhost.boot.loaders import load_image
from kvmhost.machine.pc import PcMachine
from kvmhost.vm.protocol import Vm

PORT = 0x5B0
CODE = bytes.fromhex(
    "ba b0 05"  # mov $0x5b0, %dx
    "b0 07"  # mov $7, %al
    "ee"  # out %al, (%dx)
    "ec"  # in (%dx), %al
    "e6 f4"  # out %al, $0xf4: the debug exit
    "f4"  # hlt
)


class Doubler:
    """A :class:`~kvmhost.devices.bus.BusDevice`: offsets count from the start of its range."""

    def __init__(self) -> None:
        self.written: list[int] = []

    def read(self, offset: int, size: int) -> int:
        """Return what the guest reads."""
        return 2 * self.written[-1]

    def write(self, offset: int, size: int, value: int) -> None:
        """Take what the guest writes."""
        self.written.append(value)


def report(vm: Vm) -> None:
    """Print the state of a VM: a machine in this process, or a Client of another one."""
    state, n_pages = vm.state(), int(vm.resident().sum())
    enough = "3 pages or more" if n_pages >= 3 else f"{n_pages} pages"
    print(f"running: {state.running}, paused: {state.paused}, resident: {enough}")


def main() -> None:
    """Run the guest with the device."""
    device = Doubler()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "guest.flat"
        file.write_bytes(CODE)
        image = load_image(file, "flat16")
    assert not isinstance(image, Image)  # that one is for a tiny guest
    with PcMachine(image, mem_bytes=16 << 20) as machine:
        machine.bus.add_port(PORT, 1, device)  # before the first run
        with machine.stopped_vcpus():
            print(f"registers at the start: rip={machine.vcpus[0].registers()['rip']:#x}")
        report(machine)
        machine.start()
        status = machine.wait(timeout_s=60)
    print(
        f"the device got {device.written}; the guest exited with status {status}, "
        f"({2 * device.written[0]} << 1) | 1"
    )


if __name__ == "__main__":
    main()
