"""Guest images and where they are.

The sources are in ``guests/x86_64``; :mod:`kvmhost.guests.build` compiles them.
"""

from __future__ import annotations

from pathlib import Path

from kvmhost.suggest import unknown_name

__all__ = ["image_names", "image_path"]

IMAGES = Path(__file__).resolve().parent / "x86_64"


def image_names() -> list[str]:
    """Return the names of the built-in guests."""
    return sorted(path.stem for path in IMAGES.glob("*.elf"))


def image_path(name: str) -> Path:
    """Return the image of a built-in guest.

    :raises FileNotFoundError: if there is no guest of that name, or it is not built
    """
    path = IMAGES / f"{name}.elf"
    if not path.is_file():
        raise FileNotFoundError(unknown_name("guest", name, image_names()) + _unbuilt())
    return path


def _unbuilt() -> str:
    """Return what to do where no guest is built, else ""."""
    return "" if image_names() else "; none are built: run python -m kvmhost.guests.build"
