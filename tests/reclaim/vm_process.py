"""A VM process for tests: a machine with its control server, until the guest ends.

    python vm_process.py NAME IMAGE MEM_BYTES N_VCPUS [k=v ...]

Prints ``ready`` when clients may connect; exits with the guest's status.
"""

from __future__ import annotations

import sys

from guests import image_path
from kvmhost.control.server import ControlServer
from kvmhost.errors import KvmHostError
from kvmhost.machine import Machine


def main(argv: list[str]) -> int:
    name, image, mem_bytes, n_vcpus, *pairs = argv
    params = {key: int(value, 0) for key, _, value in (pair.partition("=") for pair in pairs)}
    try:
        with (
            Machine(
                image_path(image),
                name=name,
                mem_bytes=int(mem_bytes),
                n_vcpus=int(n_vcpus),
                params=params,
                console_fd=2,
            ) as machine,
            ControlServer(machine),
        ):
            machine.start()
            print("ready", flush=True)
            return machine.wait()
    except KvmHostError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
