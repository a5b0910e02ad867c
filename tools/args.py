"""Parsers of arguments: sizes, times, shares, numbers, ranges, parameters, images."""

from __future__ import annotations

import argparse
import re
import typing
from pathlib import Path

from kvmhost.errors import ImageError, LayoutError
from kvmhost.units import PAGE_BYTES, Bytes, Mark, Seconds, Share
from kvmhost.vm.checks import check_view

if typing.TYPE_CHECKING:
    from kvmhost.boot.pcboot import Module

__all__ = [
    "about",
    "count",
    "find_image",
    "gfn",
    "gfn_range",
    "hot_part",
    "limit_bytes",
    "mark",
    "mem_bytes",
    "number",
    "pages",
    "parse_fw_cfg",
    "parse_modules",
    "parse_params",
    "seconds",
    "share",
    "size_bytes",
    "view_name",
    "window_range",
]


def about(docstring: str | None) -> str:
    """Return a module's docstring without markup, as the description in its command's help."""
    return (docstring or "").replace("``", "")


def size_bytes(text: str) -> int:
    """Parse a number of bytes: ``256M``, ``1.5GiB``, ``8192pages``, ``65536``.

    :raises argparse.ArgumentTypeError: for anything else
    """
    return int(_parsed(Bytes, text))


def mem_bytes(text: str) -> int:
    """Parse the size of guest memory; 0 is an error.

    :raises argparse.ArgumentTypeError: for anything else
    """
    value = size_bytes(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a guest needs memory; write for example 64M")
    return value


def limit_bytes(text: str) -> int:
    """Parse a limit of memory: at least a page, or 0 for none.

    :raises argparse.ArgumentTypeError: for anything else
    """
    value = size_bytes(text)
    if 0 < value < PAGE_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r}: less than a page of {PAGE_BYTES} bytes")
    return value


def hot_part(text: str) -> Mark:
    """Parse a size or a share above 0.

    :raises argparse.ArgumentTypeError: for anything else
    """
    value = mark(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r}: need a size or a share above 0")
    return value


def seconds(text: str) -> float:
    """Parse a time above 0: ``500ms``, ``1s``, ``2m``, ``1h``; a bare number is seconds.

    :raises argparse.ArgumentTypeError: for anything else
    """
    value = float(_parsed(Seconds, text))
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r}: need a time above 0")
    return value


def share(text: str) -> float:
    """Parse a share, greater than 0 and at most 1: ``12.5%``, ``1/8`` or ``0.125``.

    :raises argparse.ArgumentTypeError: for anything else
    """
    value = float(_parsed(Share, text))
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: need a share above 0 and up to 100%")
    return value


def mark(text: str) -> Mark:
    """Parse a size or a share of something: ``64M``, ``25%``.

    :raises argparse.ArgumentTypeError: for anything else
    """
    return _parsed(Mark, text)


_Amount = typing.TypeVar("_Amount", Bytes, Seconds, Share, Mark)


def _parsed(kind: type[_Amount], text: str) -> _Amount:
    try:
        return kind.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """Parse a number that is at least 1.

    :raises argparse.ArgumentTypeError: for a smaller number
    """
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: need 1 or more")
    return value


def number(text: str) -> int:
    """Parse a number that is at least 0.

    :raises argparse.ArgumentTypeError: for anything else
    """
    value = _integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: need 0 or more")
    return value


def pages(text: str) -> int:
    """Parse a number of pages, which may be 0.

    :raises argparse.ArgumentTypeError: for anything else
    """
    value = _integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: need 0 or more pages")
    return value


def gfn(text: str) -> int:
    """Parse a guest frame number, in hex with ``0x``.

    :raises argparse.ArgumentTypeError: for anything else
    """
    value = _integer(text)
    if not 0 <= value < 1 << 52:
        raise argparse.ArgumentTypeError(f"{text!r}: a gfn is a number from 0 to 2^52 - 1")
    return value


def view_name(text: str) -> str:
    """Parse the name of a view.

    :raises argparse.ArgumentTypeError: for a name that no view can have
    """
    try:
        check_view(text)
    except LayoutError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def gfn_range(text: str) -> tuple[int, int]:
    """Parse ``A:B``, in hex with ``0x``.

    :raises argparse.ArgumentTypeError: for anything else
    """
    try:
        start, end = (int(part, 0) for part in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"invalid range {text!r}; write for example 0x400:0x1000"
        ) from None
    return start, end


def window_range(text: str) -> tuple[int | None, int | None]:
    """Parse ``A:B``, either of which may be missing.

    :raises argparse.ArgumentTypeError: for anything else
    """
    match = re.fullmatch(r"(-?[0-9]{1,18})?:(-?[0-9]{1,18})?", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"invalid range of windows {text!r}; write 0:60, or =-60: for the last 60"
        )
    first, end = match.groups()
    return (None if first is None else int(first), None if end is None else int(end))


def _integer(text: str) -> int:
    try:
        return int(text[:64], 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid number {text!r}") from None


def parse_params(given: list[str]) -> dict[str, str]:
    """Parse ``name=value`` words; the image says which values its parameters take.

    :raises LayoutError: for a word without a name or a value
    """
    params = {}
    for word in given:
        name, _, value = word.partition("=")
        if not name or not value:
            raise LayoutError(f"--param {word!r}: need name=value, for example pages=4096")
        params[name] = value
    return params


def parse_modules(text: str) -> list[Module]:
    """Parse ``FILE[ ARGS][,FILE[ ARGS]...]``; a comma in a name is written twice.

    :raises ImageError: if a file cannot be read
    """
    from kvmhost.boot.elf import read_file
    from kvmhost.boot.pcboot import Module

    modules = []
    for word in text.replace(",,", "\0").split(","):
        path, _, arguments = word.replace("\0", ",").partition(" ")
        modules.append(Module(path, arguments, read_file(Path(path))))
    return modules


def parse_fw_cfg(given: list[str]) -> dict[str, bytes]:
    """Parse words ``name=NAME,file=PATH`` and ``name=NAME,string=TEXT``.

    :raises LayoutError: for any other word, or an invalid or duplicate name
    :raises ImageError: if a file cannot be read
    """
    from kvmhost.boot.elf import read_file
    from kvmhost.devices.fwcfg import check_name

    files: dict[str, bytes] = {}
    for word in given:
        head, _, tail = word.partition(",")
        name = head.removeprefix("name=")
        kind, equals, value = tail.partition("=")
        if not equals or kind not in ("file", "string"):
            raise LayoutError(f"--fw-cfg {word!r}: need name=NAME,file=PATH or ,string=TEXT")
        check_name(name)
        if name in files:
            raise LayoutError(f"--fw-cfg {word!r}: the name is there already")
        files[name] = read_file(Path(value)) if kind == "file" else value.encode()
    return files


def find_image(name: str) -> Path:
    """Resolve an image name: a file if it looks like a path, else a built-in guest.

    :raises ImageError: if neither exists
    """
    from kvmhost.guests import image_names, image_path

    if "/" in name or name.endswith(".elf"):
        return Path(name)
    if name not in image_names() and Path(name).exists():
        return Path(name)
    try:
        return image_path(name)
    except FileNotFoundError as error:
        raise ImageError(name, "image", f"no such file; {error}") from None
