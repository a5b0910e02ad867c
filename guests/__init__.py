"""Guest images and where they are.

The sources are in ``guests/x86_64``; :mod:`kvmhost.guests.build` compiles them.
"""

from __future__ import annotations

from pathlib import Path

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
        known = ", ".join(image_names()) or "none are built: run make guests"
        raise FileNotFoundError(f"no built-in guest {name!r}; there are: {known}")
    return path
