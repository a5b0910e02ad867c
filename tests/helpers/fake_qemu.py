"""A program in QEMU's place: it takes the same command line and plays one host.

``FAKE_HOST`` says what the host does: ``ok``, ``fail`` (its command), ``panic``, ``hang``,
``mute`` (boots, and its command never ends), ``crash``, ``refuse`` (ends with a message) or
``stay`` (does not power off). ``FAKE_LOG`` gets its process number and its arguments. With a
monitor, the machine starts when it is told to; ``FAKE_TREE`` is what its memory has at 4096.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

__all__ = ["main"]


def main() -> int:
    """Play the host."""
    if "--version" in sys.argv:
        print("QEMU emulator version 7.2.22 (Debian)")
        return 0
    does = os.environ["FAKE_HOST"]
    Path(os.environ["FAKE_LOG"]).write_text(json.dumps([os.getpid(), *sys.argv]))
    words = " ".join(sys.argv)
    ports = {
        name: socket.socket(fileno=int(fd))
        for name, fd in re.findall(r"socket,id=([\w.]+),fd=(\d+)", words)
    }
    (console,) = re.findall(r"file,id=console,path=(\S+)", words)
    say = Path(console).write_text
    if does == "refuse":
        print("qemu: unsupported machine type", file=sys.stderr)
        return 1
    if "monitor" in ports:
        (ram,) = re.findall(r"mem-path=([^,\s]+)", words)
        wait_for_start(ports["monitor"], ram)
    if does == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if does == "panic":
        say("booting\r\nkvmhost-lab: mount -t 9p\r\n[ 1.2] Kernel panic - not syncing: init!\r\n")
        return 0
    if does == "hang":
        say("the last thing that it said\n")
        time.sleep(3600)
    ports["lab.control"].sendall(b"ready\n")
    if does == "mute":
        time.sleep(3600)
    ports["lab.out"].sendall(b"to output \xff\n" + bytes(300_000))
    ports["lab.err"].sendall(b"to error\n")
    ports["lab.control"].sendall(b"status %d\n" % (7 if does == "fail" else 0))
    if does == "stay":
        time.sleep(3600)
    return 0


def wait_for_start(monitor: socket.socket, ram: str) -> None:
    """Put a device tree into memory, greet, and answer until the machine is to start."""
    with Path(ram).open("r+b") as file:
        file.seek(4096)
        file.write(bytes.fromhex(os.environ["FAKE_TREE"]))
    with monitor.makefile("rwb") as lines:
        lines.write(b'{"QMP": {}}\n')
        lines.flush()
        for line in lines:
            lines.write(b'{"return": {}}\n')
            lines.flush()
            if json.loads(line)["execute"] == "cont":
                return


if __name__ == "__main__":
    sys.exit(main())
