"""Programs to attach to: one of our own that shares no code with kvmhost, and QEMU."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminals import terminal

__all__ = ["terminal"]

HERE = Path(__file__).parent
QEMU = "qemu-system-x86_64"


class Toucher:
    """``toucher.c`` as a process."""

    def __init__(self, program: Path, pages: int, *words: str) -> None:
        self.process = subprocess.Popen(
            [str(program), str(pages), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = int(self.process.stdout.readline(), 16)

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="session")
def toucher_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("toucher") / "toucher"
    command = ["cc", "-O1", "-Wall", "-Werror", str(HERE / "toucher.c"), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


@pytest.fixture
def toucher(toucher_program: Path) -> Iterator[Callable[..., Toucher]]:
    made: list[Toucher] = []

    def make(pages: int = 4096, *words: str) -> Toucher:
        made.append(Toucher(toucher_program, pages, *words))
        return made[-1]

    yield make
    for one in made:
        one.end()


class Qemu:
    """QEMU with a memfd for memory and ``multiboot.S`` in it."""

    def __init__(self, image: Path, mem_mib: int) -> None:
        backend = f"memory-backend-memfd,id=m,size={mem_mib}M,share=on"
        self.process = subprocess.Popen(
            [
                QEMU, "-accel", "tcg", "-m", str(mem_mib), "-object", backend,
                "-machine", "pc,memory-backend=m", "-nodefaults", "-display", "none",
                "-monitor", "none", "-serial", "stdio", "-no-reboot", "-kernel", str(image),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    def touch(self, phase: int) -> None:
        """Have the guest touch the pages of a phase; return when it has."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        byte = bytes([ord("a") + phase])
        self.process.stdin.write(byte)
        self.process.stdin.flush()
        assert self.process.stdout.read(1) == byte

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="session")
def multiboot_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("multiboot")
    compiled, image = directory / "multiboot.o", directory / "multiboot.bin"
    source = HERE / "multiboot.S"
    subprocess.run(["cc", "-m32", "-c", str(source), "-o", str(compiled)], check=True)
    subprocess.run(["objcopy", "-O", "binary", str(compiled), str(image)], check=True)
    return image


@pytest.fixture
def qemu(multiboot_image: Path) -> Iterator[Qemu]:
    one = Qemu(multiboot_image, 64)
    yield one
    one.end()
